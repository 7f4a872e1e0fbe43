"""A graded record on a terminal: texts with their tokens coloured, or marked where there is no colour, and the worst
tokens with what the teacher would have written instead."""

from __future__ import annotations

import math
import textwrap
from bisect import bisect_right
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from opd.journal.graded import GradedAnswer, GradedRecord, by_domain, members, penalty, worst, writer_of
from opd.reports.crossed import said
from opd.reports.figures import counted
from opd.reports.printable import printable
from opd.reports.progress import is_live, say

EDGES = (0.7, 1.5, 3.0, 6.0)  # nats at which the colour changes; below the first there is none
MARKED = 3.0  # without colours, tokens with a penalty below minus this are put in brackets
LESS = ("#000000 on #f8bd8c", "#000000 on #f29a55", "#ffffff on #c2500a", "#ffffff on #7f2f00")  # orange: worse
MORE = ("#000000 on #a3cbee", "#000000 on #6fabe0", "#ffffff on #1f6cb5", "#ffffff on #0b3d75")  # blue: better
WORST = 10  # tokens in the list
TOKENS = 400  # of one answer; of a longer one, those around its worst token


def show(record: GradedRecord, console: Console | None = None, *, limit: int = 3) -> None:
    """Prints what each teacher thinks of the record, in 80 columns.

    limit   so many answers are shown as text, those with the worst tokens; the lists are about all of them.
    """
    console = console or Console()
    tokens = sum(sum(answer["mask"]) for answer in record["answers"])
    say(console, f"{record['title']}: {counted(len(record['answers']), 'answer')}, {counted(tokens, 'token')}", "bold")
    for teacher in record["teachers"]:
        console.print()
        _Shown(record, teacher, console).all(limit)


class _Shown:
    """The view of one teacher."""

    def __init__(self, record: GradedRecord, teacher: str, console: Console) -> None:
        self.record, self.teacher, self.console, self.student = record, teacher, console, record["student"]
        self.writer = writer_of(record)
        self.penalties = [penalty(answer, teacher, self.writer) for answer in record["answers"]]
        self.crossed = record["readers"][teacher].get("crossed")
        self.colours = is_live(console) and not console.no_color and console.color_system in ("256", "truecolor")
        self.width = min(console.width, 80)

    def all(self, limit: int) -> None:
        self._legend()
        found = worst(self.record, sum(map(len, self.penalties)), self.teacher)
        if not found:
            self._say("There is no token that can be shown: all are masked, or no number is finite.")
            return
        for index in sorted(list(dict.fromkeys(answer for answer, _, _ in found))[:limit]):
            self._answer(index)
        hidden = len(self.record["answers"]) - limit
        if hidden > 0:
            self.console.print()
            self._say(f"{counted(hidden, 'more answer')}, whose worst tokens are not as bad")
        self._worst([one for one in found[:WORST] if one[2] <= -EDGES[0]])
        self._domains()

    # ---- what the colours mean ---------------------------------------------------------------------------------------

    def _legend(self) -> None:
        name, model = self.teacher, self.record["readers"][self.teacher]["model"]
        self._say(f"{name} ({model})", "bold")
        times = f"{math.exp(MARKED):.0f} times less likely"
        if self.writer is None:
            rule = (
                "The penalty of a token is log q + entropy, in nats; q is the probability that the teacher gave it. "
                f"0 is what the teacher expects of its own words, -{MARKED:.0f} is {times}."
            )
        else:
            own = self.record["readers"][self.writer]["model"]
            rule = (
                "The penalty of a token is log q - log p, in nats; q is the probability that the teacher gave it, p "
                f"that of the student ({own}). 0: the same for both, -{MARKED:.0f}: {times} for the teacher."
            )
        if self.crossed is not None:
            rule += f" {said(name, self.crossed)} Of what lies between, the tokens have equal shares."
        for line in textwrap.wrap(printable(rule, encoding=self.console.encoding), self.width):
            self._say(line)
        if self.colours:
            scale = Text("colours: ")
            for edge, style in reversed(tuple(zip(EDGES, LESS, strict=True))):
                scale.append(f" -{edge:g} ", style)
            scale.append(" as expected " if self.writer is None else " both alike ")
            for edge, style in zip(EDGES, MORE, strict=True):
                scale.append(f" +{edge:g} ", style)
            self.console.print(scale, soft_wrap=True)
        else:
            self._say(f"Tokens below -{MARKED:.0f} are marked: [token penalty].")

    # ---- texts -------------------------------------------------------------------------------------------------------

    def _answer(self, index: int) -> None:
        answer, penalties = self.record["answers"][index], self.penalties[index]
        self.console.print()
        turn = f", turn {answer['turn'] + 1}" if answer["turn"] else ""
        self._say(self._fit(f"{answer['id']}{turn}", self.width), "bold")
        start, end = _stretch(penalties)
        units = _units(answer, self.teacher, start, end)
        tokens = [part for unit in units for part in self._unit(answer, unit, penalties[unit[0]])]
        if start:
            tokens.insert(0, Text("... "))
        if end < len(penalties):
            tokens.append(Text(" ..."))
        self.console.print(_lines(tokens, self.width), width=self.width, overflow="fold")

    def _unit(self, answer: GradedAnswer, unit: Sequence[int], value: float | None) -> list[Text]:
        """One token, or those of a span; a mark is around all of it."""
        if self.colours or value is None or value > -MARKED:
            return [self._token(answer["pieces"][token], answer["ids"][token], value) for token in unit]
        return [self._token("".join(answer["pieces"][token] for token in unit), answer["ids"][unit[0]], value)]

    def _token(self, piece: str, number: int, value: float | None) -> Text:
        if value is None or value > -MARKED:
            style = "dim" if value is None else self._style(value)
            return Text(printable(piece, lines=True, encoding=self.console.encoding), style=style)
        # A space in front stays outside of the mark, as a line break behind it does: the text keeps its shape.
        shown = self._named(piece, number)
        before, after = (" " if piece[:1] == " " and piece != " " else ""), "\n" * piece.count("\n")
        body = shown.removeprefix(before) if before else shown
        if self.colours:
            return Text(before).append(body, self._style(value)).append(after)
        return Text(f"{before}[{body} {value:.1f}]{after}")

    def _style(self, value: float) -> str:
        level = bisect_right(EDGES, abs(value))
        return "" if not self.colours or level == 0 else (LESS if value < 0 else MORE)[level - 1]

    def _named(self, piece: str, number: int) -> str:
        """A token as one line; one that shows nothing by itself is called by its id."""
        return printable(piece, encoding=self.console.encoding) or f"<id {number}>"

    # ---- lists -------------------------------------------------------------------------------------------------------

    def _worst(self, found: Sequence[tuple[int, int, float]]) -> None:
        self.console.print()
        self._say("Worst tokens", "bold")
        if not found:
            self._say(f"No token has a penalty below -{EDGES[0]:g}.")
            return
        student = "  student" if self.student is not None else ""
        self._say(f"penalty  teacher{student}   (log-probabilities)")
        for index, token, value in found:
            answer = self.record["answers"][index]
            span, theirs = self._span(answer, token)
            figures = f"{value * len(span):7.1f}  {_sum(answer['logprobs'][self.teacher], span):7.1f}"
            if self.student is not None:
                figures += f"  {_sum(answer['logprobs'][self.student], span):7.1f}"
            self._say(f"{figures}   {self._context(answer, span, self.width - len(figures) - 3)}")
            which = f"token {token + 1}" if len(span) == 1 else f"tokens {token + 1} to {span[-1] + 1}"
            self._say(self._fit(f"         {which} of {self._fit(answer['id'], 40)}{theirs}", self.width))
            for name in (self.teacher, *([self.student] if self.student else [])):
                self._say(
                    self._fit(f"         {name} would write {self._alternatives(answer, name, token)}", self.width)
                )

    def _span(self, answer: GradedAnswer, token: int) -> tuple[list[int], str]:
        """The tokens of the span that a token begins, and how a teacher with another tokenizer reads it, in words."""
        for span, own in zip(members(answer, self.teacher), answer.get("own", {}).get(self.teacher, ()), strict=True):
            if span[0] == token:
                parts = " ".join(f'"{self._named(piece, number)}"' for number, piece, _ in own)
                return span, f", for {self.teacher} {parts}" if len(span) + len(own) > 2 else ""
        return [token], ""

    def _context(self, answer: GradedAnswer, span: Sequence[int], width: int) -> str:
        """The tokens in brackets, with what stands around them."""
        pieces, token, last = answer["pieces"], span[0], span[-1]
        inside = "".join(pieces[token : last + 1])
        body = self._fit(f"[{self._named(inside, answer['ids'][token])}]", width - 8)
        room = (width - cell_len(body)) // 2
        before = answer["prompt"][-room:] + "".join(pieces[max(0, token - room) : token])
        before = self._fit(before, room, start=True)
        after = self._fit("".join(pieces[last + 1 : last + 1 + room]), width - cell_len(body) - cell_len(before))
        return f"{before}{body}{after}"

    def _alternatives(self, answer: GradedAnswer, reader: str, token: int) -> str:
        shown = []
        texts, row = self.record["texts"], answer["top"][reader][token]
        spans = answer.get("spans", {}).get(reader)
        if spans is not None and spans[token] >= 0:  # in its own numbering
            texts = self.record.get("own_texts", {})[reader]
            row = answer.get("own_top", {})[reader][spans[token]]
        for number, logprob in row:
            name = self._named(texts[str(number)], number)
            chance = 100 * math.exp(logprob)
            shown.append(f'"{name}" {chance:.1f} %' if chance >= 0.1 else f'"{name}" <0.1 %')
        return ", ".join(shown) or "nothing: its numbers are not finite"

    def _domains(self) -> None:
        self.console.print()
        self._say("By domain", "bold")
        self._say("mean penalty   tokens")
        for domain, mean in by_domain(self.record, self.teacher).items():
            self._say(f"{mean['mean']:12.3f}  {mean['count']:7d}   {self._fit(domain, self.width - 24)}")

    # ---- text that fits ----------------------------------------------------------------------------------------------

    def _say(self, text: str, style: str = "") -> None:
        say(self.console, text, style)

    def _fit(self, text: str, cells: int, *, start: bool = False) -> str:
        """`text` as one harmless line of at most so many cells; what does not fit is cut off at its end, or start."""
        line = printable(text, encoding=self.console.encoding)
        if cell_len(line) <= cells:
            return line
        kept, room = "", max(0, cells - 3)
        for character in reversed(line) if start else line:
            if cell_len(kept + character) > room:
                break
            kept = character + kept if start else kept + character
        return f"...{kept}" if start else f"{kept}..."


def _sum(values: Sequence[float | None], places: Sequence[int]) -> float:
    return math.fsum(values[place] or 0.0 for place in places)


def _units(answer: GradedAnswer, teacher: str, start: int, end: int) -> list[list[int]]:
    """The tokens of [start, end), those of a span together."""
    inside = {token: span for span in members(answer, teacher) for token in span}
    units: list[list[int]] = []
    for token in range(start, end):
        span = inside.get(token, [token])
        if units and units[-1][-1] in span:
            units[-1].append(token)
        else:
            units.append([token])
    return units


def _stretch(penalties: Sequence[float | None]) -> tuple[int, int]:
    """The tokens of an answer that are shown: all, or `TOKENS` around the worst."""
    if len(penalties) <= TOKENS:
        return 0, len(penalties)
    known = [(value, n) for n, value in enumerate(penalties) if value is not None]
    centre = min(known)[1] if known else 0
    start = min(max(0, centre - TOKENS // 2), len(penalties) - TOKENS)
    return start, start + TOKENS


def _lines(tokens: Sequence[Text], width: int) -> Text:
    """Tokens as lines of at most `width` cells, broken between words, and between tokens where a word is longer."""
    words: list[list[Text]] = []
    for token in tokens:
        if not token.plain:
            continue
        if not words or token.plain[0] in " \n" or words[-1][-1].plain[-1] in " \n":
            words.append([])
        words[-1].append(token)
    made, column = Text(), 0
    for word in words:
        for n, token in enumerate(word):
            ahead = word if n == 0 and _cells(word) <= width else [token]
            if column and column + _cells(ahead) > width:
                made.append("\n")
                column = 0
            made.append_text(token)
            last = token.plain.rpartition("\n")[2]
            column = cell_len(last) + (0 if "\n" in token.plain else column)
    return made


def _cells(tokens: Sequence[Text]) -> int:
    """Of the first line of these tokens."""
    return cell_len("".join(token.plain for token in tokens).partition("\n")[0])
