"""Which curves of a run are drawn, and the one line that says what each of them means."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from opd.reports.crossed import joined
from opd.reports.figures import count, interval, percent
from opd.reports.objective import scorers
from opd.reports.page.base import attribute, text
from opd.reports.page.charts import (
    COLOURS,
    WHISKERS,
    Chart,
    Reference,
    Series,
    legend,
    line_chart,
    percent_label,
    short_count,
)
from opd.reports.page.thinning import smooth, window_for
from opd.reports.run_data import Curve, RunData

POSITION = re.compile(r"reverse_kl/position/(\d+)-(\d*)\Z")
DOMAIN = "reverse_kl/domain/"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with its heading, its one-line meaning, and its legend."""

    key: str
    title: str
    caption: str
    chart: Chart
    names: Sequence[tuple[str, int]] = ()
    percent: bool = False

    def html(self) -> str:
        names = legend(self.names) if self.names else ""
        several = ' class="several"' if len(self.chart.hover["series"]) > 1 else ""
        return (
            f"<figure data-chart={attribute(self.key)}><figcaption><h3>{text(self.title)}</h3>"
            f'<p class="note">{text(self.caption)}</p></figcaption>{names}{self.chart.svg}<output{several}></output>'
            "</figure>"
        )

    def hover(self) -> dict[str, object]:
        return {**self.chart.hover, "percent": self.percent}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric with a picture of its own. `noisy`: smoothed; `worth`: whether a curve says
    anything."""

    key: str
    title: str
    caption: str
    y_label: str
    share: bool = False
    log: bool = False
    noisy: bool = True
    worth: Callable[[Curve], bool] = field(default=lambda curve: True)


ANCHORED = Metric(
    key="reverse_kl",
    title="Distance to the start",
    caption="Reverse KL to the student before training, on the student's own answers. It grows while the student "
    "learns from the reward; the anchor term holds it back.",
    y_label="nats per token",
    log=True,
)
METRICS = (
    Metric(
        key="reverse_kl",
        title="Distance to the teacher",
        caption="Reverse KL on the student's own answers: how differently student and teacher choose the next token. "
        "It should fall; 0 means alike.",
        y_label="nats per token",
        log=True,
    ),
    Metric(
        key="reward_mean",
        title="Reward",
        caption="Mean reward of the training answers, as their grader gives it. Where the objective has a term for it, "
        "it should rise.",
        y_label="reward",
    ),
    Metric(
        key="loss",
        title="Loss",
        caption="What the optimiser minimises. It should fall, unevenly.",
        y_label="loss",
    ),
    Metric(
        key="response_length",
        title="Length of answers",
        caption="Mean number of tokens. A steady climb or a collapse is a warning sign.",
        y_label="tokens per answer",
    ),
    Metric(
        key="truncated",
        title="Cut-off answers",
        caption="Share of training answers that hit the length limit before they ended. Near 0 is healthy.",
        y_label="share of answers",
        share=True,
    ),
    Metric(
        key="entropy",
        title="Entropy",
        caption="How undecided the student is at each token. Near 0 it always writes the same.",
        y_label="nats per token",
    ),
    Metric(
        key="repetition",
        title="Repetition",
        caption="Share of tokens that repeat a passage of the same answer. Above a few percent answers go in circles.",
        y_label="share of tokens",
        share=True,
        worth=lambda curve: max((y for _, y in curve if y is not None), default=0.0) > 0.005,
    ),
    Metric(
        key="tokens_per_second",
        title="Speed",
        caption="Trained tokens per second of rollout, scoring and update; evaluations are left out.",
        y_label="tokens per second",
    ),
    Metric(
        key="grad_norm",
        title="Size of the gradient",
        caption="Norm before clipping. Single peaks are clipped; steady growth is a warning sign.",
        y_label="norm",
        log=True,
    ),
    Metric(
        key="lr",
        title="Learning rate",
        caption="What the schedule set at each step.",
        y_label="learning rate",
        noisy=False,
    ),
    Metric(
        key="policy_gap",
        title="Sampler against learner",
        caption="Mean difference of the log-probability of a token when it was drawn and when it is trained on. "
        "0 is exactly on-policy.",
        y_label="nats per token",
        log=True,
        worth=lambda curve: max((y for _, y in curve if y is not None), default=0.0) > 1e-3,
    ),
)


def figures(run: RunData, *, max_points: int = 240) -> list[Figure]:
    """All pictures of a run, the two that matter most first. `max_points` of one drawn line."""
    made: list[Figure] = []
    for known in METRICS:
        metric = ANCHORED if known.key == "reverse_kl" and _is_anchored(run) else known
        if metric.key == "reverse_kl" and joined(run):
            said = f"{metric.caption} Of the tokens that are joined with a teacher of another tokenizer, see below."
            metric = replace(metric, caption=said)
        curve = _speed(run) if metric.key == "tokens_per_second" else run.curve(metric.key)
        if metric.key == "loss" and _same(curve, run.curve("reverse_kl")):
            continue
        if any(y is not None for _, y in curve) and metric.worth(curve):
            made.append(_metric(run, metric, curve, max_points))
        if metric.key == "reverse_kl":
            made += [_accuracy(run, task, i) for i, task in enumerate(run.tasks[:4])]
    made += _by_domain(run, max_points) + _by_position(run, max_points) + _coverage(run, max_points)
    return made


def _is_anchored(run: RunData) -> bool:
    """Whether a reward is what is learnt from, and the only target is the student before training, told no more."""
    terms = (run.config or {}).get("objective", {}).get("terms") or []
    targets = [term["target"] for term in terms if term.get("kind", "divergence") == "divergence"]
    have = scorers(run.config or {})
    held = [have.get(target["scorer"], {}) if target.get("kind") == "single" else {} for target in targets]
    starts = [s.get("weights") == "initial" and s.get("context", {}).get("template") == "{prompt}" for s in held]
    return bool(starts) and all(starts) and any(term.get("kind") == "outcome" for term in terms)


def spans(curve: Curve) -> bool:
    """Whether a curve covers so many magnitudes that only a logarithmic axis shows its end."""
    known = sorted(y for _, y in curve if y is not None)
    return len(known) > 1 and known[0] > 0 and known[len(known) * 19 // 20] > 15 * known[len(known) // 20]


def _metric(run: RunData, metric: Metric, curve: Curve, max_points: int) -> Figure:
    window = window_for(len(curve)) if metric.noisy else 1
    log = metric.log and spans(curve)
    caption = metric.caption + _about(curve, window, log)
    references = []
    limit = run.option("sampling.max_tokens")
    known = [y for _, y in curve if y is not None]
    if metric.key == "response_length" and isinstance(limit, int):
        if limit <= 2 * max(known):
            references = [Reference(name="limit", value=limit)]
            caption += f" Dashed: the limit of {count(limit)}."
        else:
            caption += f" The limit of {count(limit)} is far above."
    chart = line_chart(
        [Series(name=metric.title, points=curve, window=window)],
        title=metric.title,
        y_label=metric.y_label,
        log=log,
        references=references,
        limits=(0.0, 1.0) if metric.share else (None, None),
        y_format=percent_label if metric.share else short_count if max(known) >= 1000 else None,
        max_points=max_points,
    )
    return Figure(key=metric.key, title=metric.title, caption=caption, chart=chart, percent=metric.share)


def _about(curve: Curve, window: int, log: bool) -> str:
    """What the drawing itself does: smoothing, and values that are not there."""
    said = f" Bold: mean of {window} steps; faint: each step." if window > 1 else ""
    if missing := sum(y is None or (log and y <= 0) for _, y in curve):
        said += f" {count(missing)} of {count(len(curve))} steps have no finite value: gaps."
    return said


def _accuracy(run: RunData, task: str, index: int) -> Figure:
    rows = run.scores(task)
    series = Series(
        name="student",
        points=[(row["step"], row["mean"]) for row in rows],
        intervals=[(row["low"], row["high"]) for row in rows],
        marks=len(rows) <= WHISKERS,
    )
    teacher = run.score(task, "teacher")
    references, names = [], [("student, with interval", 1)]
    if teacher is not None:
        within = (teacher["low"], teacher["high"])
        references.append(Reference(name="teacher", value=teacher["mean"], interval=within, colour=2))
        names.append((f"teacher, {percent(teacher['mean'])} {interval(teacher)}", 2))
    title = "Accuracy" if len(run.tasks) == 1 else f"Accuracy: {task}"
    caption = f"Share of right answers to the held-out problems of {task}. Step 0 is before training."
    chart = line_chart(
        [series],
        title=title,
        y_label="right answers",
        references=references,
        limits=(0.0, 1.0),
        y_format=percent_label,
    )
    return Figure(key=f"task-{index}", title=title, caption=caption, chart=chart, names=names, percent=True)


def _by_domain(run: RunData, max_points: int) -> list[Figure]:
    keys = [key for key in run.metric_names if key.startswith(DOMAIN)]
    if len(keys) < 2:
        return []
    shown = [(key.removeprefix(DOMAIN), run.curve(key)) for key in keys[:COLOURS]]
    left = len(keys) - len(shown)
    caption = "The same distance for each kind of prompt." + _left_out(left)
    return [_several("domains", "Distance by domain", caption, shown, max_points)]


def _by_position(run: RunData, max_points: int) -> list[Figure]:
    found = [(match, key) for key in run.metric_names if (match := POSITION.match(key))]
    if len(found) < 2:
        return []
    found.sort(key=lambda pair: int(pair[0][1]))
    if len(found) > COLOURS:  # the first, the last, and evenly between
        found = [found[round(i * (len(found) - 1) / (COLOURS - 1))] for i in range(COLOURS)]
    shown = [(f"tokens {m[1]} to {m[2]}" if m[2] else f"tokens from {m[1]}", run.curve(key)) for m, key in found]
    caption = "The same distance early and late in the answers: prefixes may lead where the teacher is no guide."
    return [_several("positions", "Distance by position", caption, shown, max_points)]


def _coverage(run: RunData, max_points: int) -> list[Figure]:
    """One for each teacher with another tokenizer."""
    caption = (
        "This teacher has another tokenizer. Shares of the student's tokens: those in spans that both read, and those "
        "that are the same one token to both. A fall says that the student moves to text that is not trained."
    )
    return [
        _several(
            f"joined-{n}",
            f"Tokens joined with {one.name}",
            caption,
            [("in spans", one.covered), ("the same token", one.same)],
            max_points,
            share=True,
        )
        for n, one in enumerate(joined(run)[:COLOURS])
    ]


def _several(
    key: str,
    title: str,
    caption: str,
    shown: Sequence[tuple[str, Curve]],
    max_points: int,
    *,
    share: bool = False,
) -> Figure:
    window = max(window_for(len(curve)) for _, curve in shown)
    together = [point for _, curve in shown for point in curve]
    series = [
        Series(
            name=name,
            points=list(zip((x for x, _ in curve), _means(curve, window), strict=True)),
            colour=i,
            tag=chr(96 + i),
        )
        for i, (name, curve) in enumerate(shown, 1)
    ]
    chart = line_chart(
        series,
        title=title,
        y_label="share of tokens" if share else "nats per token",
        log=not share and spans(together),
        limits=(0.0, 1.0) if share else (None, None),
        y_format=percent_label if share else None,
        max_points=max_points // len(shown) + 20,
    )
    caption += f" Mean of {window} steps." if window > 1 else ""
    names = [(f"{one.tag}: {one.name}", i) for i, one in enumerate(series, 1)]
    return Figure(key=key, title=title, caption=caption, chart=chart, names=names, percent=share)


def _means(curve: Curve, window: int) -> list[float | None]:
    return smooth([y for _, y in curve], window)


def _left_out(number: int) -> str:
    return f" {count(number)} more are in metrics.jsonl." if number > 0 else ""


def _speed(run: RunData) -> Curve:
    """Trained tokens of each step over its own seconds; the journal's figure is the mean since the start."""
    spent = run.spent()
    made: Curve = []
    before = (0.0, 0.0)
    for (step, tokens), (_, seconds) in zip(spent["tokens"], spent["seconds"], strict=True):
        now = (tokens or 0.0, seconds or 0.0)
        passed = now[1] - before[1]
        made.append((step, (now[0] - before[0]) / passed if passed > 0 else None))
        before = now
    return made


def _same(one: Curve, other: Curve) -> bool:
    """Whether two curves are one: the loss of plain reverse KL is the reverse KL."""
    if len(one) != len(other):
        return False
    pairs = [(a, b) for (_, a), (_, b) in zip(one, other, strict=True) if a is not None and b is not None]
    return bool(pairs) and all(abs(a - b) <= 1e-3 * max(abs(a), abs(b)) for a, b in pairs)
