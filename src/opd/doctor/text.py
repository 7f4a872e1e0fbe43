"""Stage 1: what can be known before any weights are loaded. Tokenizers, templates, ends, prompts, data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from opd.config.schema import Config
from opd.config.scorers import all_scorers, loaded_as, option_of
from opd.doctor import thresholds as line
from opd.doctor.findings import Finding
from opd.errors import ConfigError, ModelError
from opd.prompts.mixture import PromptStream
from opd.reports.figures import counted, percent
from opd.text.agreement import Agreement, rendered_difference
from opd.text.crossing import Crossing, agree
from opd.text.formats import PromptFormat
from opd.types import Prompt, Row
from opd.wiring.build import PreparedTask, Texts, load_format, scorer_role
from opd.wiring.foreign import check_foreign, foreign_notes

PROBE_QUESTION, PROBE_ANSWER = "Is this a question?", "opdprobe"
_CHARACTERS = 2_000_000  # of data that are searched for control tokens


def load(config: Config) -> tuple[Texts | None, list[Finding]]:
    """All formats and how each scorer's agrees with the student's; no texts where they cannot read each other."""
    found: list[Finding] = []
    student = load_format(config.student, "student")
    found += _generation_prompt(student, "student", "student")
    formats: dict[str, PromptFormat] = {}
    agreements: dict[str, Agreement | Crossing] = {}
    for name, scorer in all_scorers(config).items():
        option = option_of(config, name)
        formats[name] = load_format(loaded_as(config, scorer), scorer_role(config, name))
        if scorer.weights == "model":
            found += _generation_prompt(formats[name], name, option)
        try:
            agreements[name] = agree(student, formats[name])
        except ModelError as error:
            words = student.tokenizer.tokens == formats[name].tokenizer.tokens
            found.append(
                Finding(
                    check="agreement",
                    stage=1,
                    level="stop",
                    said=str(error),
                    change=(f"{option}.format.end_tokens=[{_name(student, student.end_ids[0])!r}]",)
                    if words
                    else (f"{option}.model=...",),
                    asks="mend_template" if words else "another_teacher",
                )
            )
            continue
        agreement = agreements[name]
        if isinstance(agreement, Crossing):
            found.append(_crossing(agreement, name))
        else:
            found.append(_agreement(student, formats[name], agreement, name, option))
    if len(agreements) < len(formats):
        return None, found
    texts = Texts(student, formats, agreements)
    try:
        check_foreign(config, texts)
    except ConfigError as error:
        found.append(Finding(check="alignment", stage=1, level="stop", said=str(error), asks="mend_config"))
        return None, found
    found += [Finding(check="alignment", stage=1, level="note", said=note) for note in foreign_notes(config, texts)]
    return texts, found


def _crossing(crossing: Crossing, name: str) -> Finding:
    student, theirs = crossing.student_fmt, crossing.teacher_fmt
    ends = ", ".join(repr(_name(student, n)) for n in student.end_ids)
    sizes = student.tokenizer.vocab_size, theirs.tokenizer.vocab_size
    return Finding(
        check="agreement",
        stage=1,
        level="warn" if crossing.notes else "ok",
        said=f"{name} has another tokenizer: {sizes[1]:,} tokens where the student has {sizes[0]:,}, "
        f"{percent(crossing.matched_share)} of them are the student's, too; answers end with {ends}, which {name} "
        f"reads as its own {_name(theirs, theirs.end_ids[0])!r}" + "".join(f"; {note}" for note in crossing.notes),
        means="text is joined with text, never ids with ids: see alignment",
        figures={"tokens": sizes[1], "vocabulary": crossing.matched_share, "notes": len(crossing.notes)},
    )


def _agreement(student: PromptFormat, theirs: PromptFormat, agreement: Agreement, name: str, option: str) -> Finding:
    ends = ", ".join(repr(_name(student, n)) for n in student.end_ids)
    said = f"{name} has the student's {student.tokenizer.vocab_size} tokens; answers end with {ends}"
    for _, other in agreement.end_map:
        said += f", which {name} reads as its own {_name(theirs, other)!r}"
    notes = list(agreement.notes)
    return Finding(
        check="agreement",
        stage=1,
        level="warn" if notes else "ok",
        said=said + "".join(f"; {note}" for note in notes),
        means="an end that only one of them knows is scored as a mistake, or lets answers grow" if notes else "",
        change=(f"{option}.format.end_tokens=[{_name(student, student.end_ids[0])!r}]",) if notes else (),
        figures={"tokens": student.tokenizer.vocab_size, "notes": len(notes)},
    )


def _generation_prompt(fmt: PromptFormat, who: str, option: str) -> list[Finding]:
    """Whether a prompt ends where the template begins an answer."""
    if fmt.kind != "chat":
        return []
    hf = fmt.tokenizer.hf
    asked = [{"role": "user", "content": PROBE_QUESTION}]
    if fmt.format.system_prompt is not None:
        asked.insert(0, {"role": "system", "content": fmt.format.system_prompt})
    answered = [*asked, {"role": "assistant", "content": PROBE_ANSWER}]
    settings = dict(fmt.format.chat_template_kwargs)
    try:
        prompt = hf.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **settings)
        whole = hf.apply_chat_template(answered, tokenize=False, add_generation_prompt=False, **settings)
    except Exception:  # a template that cannot render this has been refused, or takes no answers
        return []
    if PROBE_QUESTION not in prompt:
        return [
            Finding(
                check="template",
                stage=1,
                level="stop",
                said=f"the chat template of {who} leaves the user's question out: {prompt[:200]!r}",
                change=(f"{option}.format.kind=plain",),
                asks="mend_template",
            )
        ]
    if not whole.startswith(prompt):
        return []  # it rewrites what stands before an answer, such as a thinking block
    between = whole[len(prompt) :].partition(PROBE_ANSWER)[0]
    if not between.strip():
        return []
    return [
        Finding(
            check="template",
            stage=1,
            level="stop",
            said=f"the chat template of {who} writes no generation prompt: before an answer it has {between!r}, which "
            "prompts end without",
            means=f"{who} is asked to go on with the user's turn; it has to write the markers of an answer itself",
            change=(f"{option}.tokenizer=...", f"{option}.format.kind=plain"),
            figures={"missing": between},
            asks="mend_template",
        )
    ]


def shown_difference(texts: Texts, prompts: PromptStream) -> tuple[dict[str, str], list[Finding]]:
    """What every scorer reads of the first prompt beside what the student reads, where that is not the same."""
    shown, found = {}, []
    first = prompts.batch(0)[0].row
    for name, fmt in texts.scorers.items():
        if fmt.show(first) == texts.student.show(first):
            continue
        shown[f"{name} reads another prompt than the student"] = rendered_difference(
            texts.student, fmt, first, name=name
        )
        found.append(
            Finding(
                check="rendering",
                stage=1,
                level="note",
                said=f"student ({texts.student.kind}) and {name} ({fmt.kind}) read different prompts",
                means="right where they were trained on different formats; look at the difference above",
            )
        )
    return shown, found


def prompt_findings(
    config: Config, texts: Texts, prompts: PromptStream, tasks: Sequence[PreparedTask]
) -> list[Finding]:
    """Lengths, drops, repeats, control tokens in the data, held-out problems among the prompts."""
    there = list(prompts.prompts())
    lengths = np.array([len(prompt.ids) for prompt in there])
    dropped = sum(prompts.dropped.values())
    share = dropped / max(dropped + len(there), 1)
    asked = config.run.steps * config.prompts.per_step
    limit = config.prompts.max_prompt_tokens
    found = [
        Finding(
            check="prompts",
            stage=1,
            level="warn" if share > line.DROPPED else "ok",
            said=f"{len(there):,} prompts of {int(np.median(lengths))} tokens in the median, {lengths.max()} the "
            f"longest; {dropped} dropped as longer than {limit:,} tokens; the run asks {asked:,}, each prompt "
            f"{asked / len(there):.2g} times",
            means=f"{100 * share:.0f} % of the data is not seen" if share > line.DROPPED else "",
            change=(f"prompts.max_prompt_tokens={2 * limit}",) if share > line.DROPPED else (),
            figures={
                "prompts": len(there),
                "median": int(np.median(lengths)),
                "longest": int(lengths.max()),
                "dropped": dropped,
                "asked": asked,
            },
        )
    ]
    found += _repeats(there)
    found += _forged(there, texts)
    return found + _held_out(there, tasks)


def _repeats(there: Sequence[Prompt]) -> list[Finding]:
    counts = Counter(_said(prompt.row) for prompt in there)
    again = sum(count - 1 for count in counts.values()) / len(there)
    if again <= line.TWICE:
        return []
    return [
        Finding(
            check="repeats",
            stage=1,
            level="warn",
            said=f"{100 * again:.0f} % of the prompts are there already; {counted(len(counts), 'different prompt')}",
            means="fewer things are asked than it seems",
            figures={"share": again, "different": len(counts)},
        )
    ]


def _forged(there: Sequence[Prompt], texts: Texts) -> list[Finding]:
    """Text of control tokens in the data. It is read as text, never as the token."""
    tokenizer = texts.student.tokenizer
    names = [tokenizer.tokens[n] for n in tokenizer.special_ids if len(tokenizer.tokens[n]) > 3]
    hit: Counter[str] = Counter()
    forged = searched = characters = 0
    for prompt in there:
        text = _said(prompt.row)
        characters += len(text)
        if characters > _CHARACTERS and searched:
            break
        searched += 1
        inside = [name for name in names if name in text]
        hit.update(inside)
        forged += bool(inside)
    share = forged / searched
    if share <= line.FORGED_SOME:
        return []
    said = (
        f"{forged} of {searched} prompts contain the text of a control token, most often {hit.most_common(1)[0][0]!r}"
    )
    figures = {"share": share, "searched": searched}
    if share > line.FORGED_MOST:
        return [
            Finding(
                check="forged",
                stage=1,
                level="stop",
                said=said,
                means="these prompts were rendered before: the template is applied a second time, and their markers "
                "are read as plain text. Give the chats themselves (a list of messages)",
                change=("prompts.sources.0.prompt_column=...",),
                figures=figures,
                asks="mend_template",
            )
        ]
    return [
        Finding(
            check="forged",
            stage=1,
            level="note",
            said=said,
            means="it is read as text, so nobody's data can forge a turn",
            figures=figures,
        )
    ]


def _held_out(there: Sequence[Prompt], tasks: Sequence[PreparedTask]) -> list[Finding]:
    asked = {_said(prompt.row) for prompt in there}
    found = []
    for n, task in enumerate(tasks):
        both = sum(_said(row) in asked for row in task.rows)
        if both:
            found.append(
                Finding(
                    check="held_out",
                    stage=1,
                    level="warn",
                    said=f"{both} of {len(task.rows)} problems of {task.spec.name} are among the training prompts",
                    means="its score after the run is no held-out score",
                    change=(f"evals.tasks.{n}.source=...",),
                    figures={"both": both, "problems": len(task.rows)},
                )
            )
    return found


def _said(row: Row) -> str:
    return row.prompt if isinstance(row.prompt, str) else "\n".join(turn["content"] for turn in row.prompt)


def _name(fmt: PromptFormat, number: int) -> str:
    return fmt.tokenizer.tokens[number]
