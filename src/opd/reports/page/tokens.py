"""The token view: answers with every token coloured by what the teacher thinks of it.

The page works without scripts, from a static rendering of the first answers; tokens.js replaces it by the whole view.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from opd.journal.graded import GradedAnswer, GradedRecord, members, penalty, writer_of
from opd.reports.crossed import said
from opd.reports.figures import counted
from opd.reports.page.base import asset, attribute, json_for_html, page, text
from opd.reports.page.token_columns import LEAST_BYTES, columns
from opd.reports.page.token_extent import Extent, Room, left_out

# Where the colours change, in nats. Fixed, so that two pages can be compared by eye.
PENALTY_EDGES = (0.1, 0.3, 0.7, 1.5, 3.0, 6.0)
KL_EDGES = (0.02, 0.05, 0.15, 0.4, 1.0, 2.5)

PAGE_BUDGET = 5_000_000  # a page of its own may be large; a browser still opens it at once
_SCRIPTS = ("token_parts.js", "token_columns.js", "token_spans.js", "token_panel.js", "token_charts.js", "tokens.js")
ASSETS = ("tokens.css", *_SCRIPTS)
STATIC_TOKENS = 250  # tokens shown without scripts


class TokenView(NamedTuple):
    """Parts for `page`: a section of HTML, data by element id, a style sheet and a script."""

    body: str
    data: dict[str, Any]
    css: str
    js: str


def graded_page(record: GradedRecord) -> str:
    """The page of `opd grade`: one graded record (as `graded.check` returns it) as a whole document."""
    view = token_view([record], budget_bytes=PAGE_BUDGET)
    facts = "".join(
        f"<dt>{'Student' if name == record['student'] else 'Teacher'}</dt>"
        f"<dd>{text(name)}: {text(info['model'])}"
        + (f' <span class="note mono">{text(info["fingerprint"])}</span>' if info["fingerprint"] else "")
        + "</dd>"
        for name, info in record["readers"].items()
    )
    step = "" if record["step"] is None else f", step {record['step']}"
    title = f"{record['title']}{step}"
    head = f'<h1>{text(title)}</h1>\n<dl class="facts">{facts}</dl>'
    return page(title, f"{head}\n{view.body}", css=[view.css], js=[view.js], data=view.data)


def token_view(records: Sequence[GradedRecord], *, budget_bytes: int = 180_000) -> TokenView:
    """A view of one record, or of several steps of one run, the oldest first; the reader of the page picks the step.

    Answers of two steps are the same one when prompt and turn are. `budget_bytes` bounds body and data together, as far
    as one token of one answer allows: alternatives go first, then long prompts, answers, steps and tokens. The page
    says what was left out.
    """

    def size(extent: Extent) -> int:
        body, data = _parts(records, extent)
        return len(body.encode()) + len(json_for_html(data["token-data"]).encode())

    extent = Room(records, size, LEAST_BYTES).largest(budget_bytes)
    return TokenView(*_parts(records, extent), asset("tokens.css"), _script())


def _script() -> str:
    """One function of all our files, so that no name of theirs meets another script's."""
    return '(() => {\n"use strict";\n' + "\n".join(map(asset, _SCRIPTS)) + "})();\n"


def _parts(records: Sequence[GradedRecord], extent: Extent) -> tuple[str, dict[str, Any]]:
    data = columns(records, extent) | {"penalty_edges": PENALTY_EDGES, "kl_edges": KL_EDGES}
    return _body(records, extent), {"token-data": data}


def _body(records: Sequence[GradedRecord], extent: Extent) -> str:
    parts = ['<section class="token-view" id="token-view">', "<h2>Token view</h2>"]
    crossed = (
        {name: info["crossed"] for name, info in records[-1]["readers"].items() if "crossed" in info} if records else {}
    )
    parts.append(_legend(with_student=not records or writer_of(records[-1]) is not None, with_spans=bool(crossed)))
    parts += [f'<p class="note token-crossed">{text(said(name, of))}</p>' for name, of in crossed.items()]
    if phrases := left_out(records, extent):
        parts.append(
            f'<p class="note">To keep this page small, {"; ".join(phrases)}. The JSON file has everything.</p>'
        )
    for name, why in (records[-1].get("left_out", {}) if records else {}).items():
        parts.append(f'<p class="note">{text(name)} is not among the teachers here: {text(why)}.</p>')
    if any(record["answers"] for record in records):
        parts += [_static(records[-1], extent), _APP]
    else:
        parts.append("<p>There are no answers to show.</p>")
    parts.append("</section>")
    return "\n".join(parts)


def _legend(*, with_student: bool, with_spans: bool) -> str:
    if with_student:
        how = (
            "<b>Orange</b>: the teacher likes this token less than the student did, here it would have written "
            "something else. <b>Blue</b>: the teacher likes it more than the student did. No colour: they agree."
        )
        ends = ("teacher likes it less", "teacher likes it more")
        unit = (
            "Penalty in nats: log-probability of the teacher minus that of the student. −2.3 is a tenth, "
            "−4.6 a hundredth. Each colour starts at its number."
        )
    else:
        how = (
            "<b>Orange</b>: this token surprises the teacher more than its own uncertainty explains. "
            "<b>Blue</b>: it is more expected than that. No colour: neither."
        )
        ends = ("teacher: surprised", "expected")
        unit = (
            "Penalty in nats: log-probability of the token plus the entropy, both of the teacher. Each colour starts "
            "at its number."
        )
    levels = range(1, len(PENALTY_EDGES) + 1)
    less = [f'<span class="t-m{i}">−{PENALTY_EDGES[i - 1]:g}</span>' for i in reversed(levels)]
    more = [f'<span class="t-p{i}">+{PENALTY_EDGES[i - 1]:g}</span>' for i in levels]
    kl = [f'<span class="t-k{i + 1}">{edge:g}</span>' for i, edge in enumerate(KL_EDGES)]
    zero = '<span class="t-0">0</span>'
    return "\n".join(
        [
            '<div class="token-legend" id="token-legend-penalty">',
            _scale(how, ends, [*less, zero, *more], unit),
            '</div><div class="token-legend" id="token-legend-kl" hidden>',
            _scale(
                "The stronger, the more the teacher would do something else here than the student, whatever came.",
                ("no difference", "large"),
                [zero, *kl],
                "KL(student || teacher) in nats, over the whole vocabulary. Each colour starts at its number.",
            ),
            "</div>",
            *([_SPANS] if with_spans else []),
            '<p class="note token-marks"><span class="t-masked">hatched</span> masked, does not count '
            '<span class="t-0 t-end">framed</span> end of the answer '
            '<span class="t-0 t-part">#7</span> part of a character <span class="t-mark">↵</span> line break</p>',
        ]
    )


_SPANS = (
    '<p class="note token-marks"><span class="t-0 t-join t-join-first">to</span><span class="t-0 t-join">geth</span>'
    '<span class="t-0 t-join t-join-last">er</span> one span, which the teacher reads in tokens of its own: its number '
    'is shared equally <span class="t-0 t-split">split</span> one token here, several of the teacher&#39;s '
    '<span class="t-unmapped">dotted</span> the teacher reads nothing here, or something else: no number</p>'
)


def _scale(how: str, ends: tuple[str, str], colours: Sequence[str], unit: str) -> str:
    left, right = (f"<span>{end}</span>" for end in ends)
    return (
        f'<p class="lead">{how}</p><div class="token-ends">{left}{right}</div>'
        f'<div class="token-scale">{"".join(colours)}</div><p class="note">{unit}</p>'
    )


def colour_class(value: float | None, counts: int, *, unmapped: bool = False) -> str:
    """The style of a token whose penalty is `value`; `counts` is its mask. unmapped: it is in no span."""
    if not counts:
        return "t-masked"
    if unmapped:
        return "t-unmapped"
    if value is None:
        return "t-0"
    level = bisect_right(PENALTY_EDGES, round(abs(value), 3))  # as tokens.js has it
    return f"t-{'0' if level == 0 else ('m' if value < 0 else 'p') + str(level)}"


def _static(record: GradedRecord, extent: Extent) -> str:
    left = STATIC_TOKENS
    parts = ['<div class="token-static" id="token-static">']
    for index in extent.kept_answers(record):
        if left <= 0:
            break
        answer = record["answers"][index]
        shown = min(left, extent.kept_tokens(answer))
        parts.append(f"<h3>{text(answer['id'])}</h3>")
        parts.append(f'<div class="token-text">{_spans(record, answer, shown)}</div>')
        if shown < len(answer["ids"]):
            parts.append(f'<p class="note">{shown} of {counted(len(answer["ids"]), "token")}.</p>')
        left -= max(shown, 1)
    parts.append("<noscript><p>The other answers and all figures need JavaScript, which is off here.</p></noscript>")
    return "\n".join([*parts, "</div>"])


def _spans(record: GradedRecord, answer: GradedAnswer, shown: int) -> str:
    teacher = record["teachers"][0]
    values, joins = penalty(answer, teacher, writer_of(record)), _joins(answer, teacher)
    spans = []
    for i in range(shown):
        value, piece, token = values[i], answer["pieces"][i], answer["ids"][i]
        join = joins[i] if joins else ""
        styles = colour_class(value, answer["mask"][i], unmapped=join is None) + (join or "")
        if not piece:
            styles += " t-part"
        if i == len(answer["ids"]) - 1 and answer["finish_reason"] == "stop":
            styles += " t-end"
        told = f"id {token}" if value is None else f"{value:+.2f} nats, id {token}"
        if join is None:
            told = f"{teacher} reads nothing here, or something else; id {token}"
        shows = text(piece, lines=True).replace("\n", "↵\n") or f"#{token}"
        spans.append(f"<span class={attribute(styles)} title={attribute(told)}>{shows}</span>")
    return "".join(spans)


def _joins(answer: GradedAnswer, teacher: str) -> list[str | None]:
    """How each token stands in its span, as a style (token_spans.js), None in none; nothing of one tokenizer."""
    if teacher not in answer.get("spans", {}):
        return []
    made: list[str | None] = [None] * len(answer["ids"])
    for tokens, own in zip(members(answer, teacher), answer.get("own", {})[teacher], strict=True):
        for token in tokens:
            made[token] = " t-join" if len(tokens) > 1 else " t-split" if len(own) > 1 else ""
        if len(tokens) > 1:
            made[tokens[0]] = " t-join t-join-first"
            made[tokens[-1]] = " t-join t-join-last"
    return made


# Filled by tokens.js.
_APP = """\
<div class="token-app" id="token-app" hidden>
<div class="token-controls screen-only">
<label>Step <select id="token-step"></select></label>
<label>compared with <select id="token-beside"></select></label>
<label>Teacher <select id="token-teacher"></select></label>
<label>Colour <select id="token-colour"><option value="penalty">penalty</option>\
<option value="kl">KL(student || teacher)</option></select></label>
<label>Domain <select id="token-domain"></select></label>
<label>Answer <select id="token-answer"></select></label>
<span class="token-jump"><button type="button" id="token-previous" aria-keyshortcuts="p">previous worst \
<kbd>p</kbd></button><button type="button" id="token-next" aria-keyshortcuts="n">next worst <kbd>n</kbd></button>
<label><input type="checkbox" id="token-only"> in this answer only</label>
<span class="note" id="token-rank" role="status"></span></span>
</div>
<div class="token-columns">
<div id="token-panes"></div>
<aside class="token-panel raised" id="token-panel" aria-live="polite" aria-label="The token"></aside>
</div>
<div class="token-charts">
<figure><figcaption id="token-by-position-title"></figcaption><div id="token-by-position"></div></figure>
<figure><figcaption id="token-by-domain-title"></figcaption><div id="token-by-domain"></div></figure>
</div>
</div>"""
