"""A run while it goes on: bars on a terminal, single lines anywhere else. Knows numbers and names, no room."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from opd.reports.figures import count, duration, interval, number, percent
from opd.reports.printable import printable

HEARTBEAT = 30.0  # seconds without a line after which a long phase says that it is alive
HEADLINES = ("reverse_kl", "loss")  # the first of these that a step reports is shown


def is_live(console: Console) -> bool:
    """Whether lines of this console can be drawn over: a terminal that knows cursor movement."""
    return console.is_terminal and not console.is_dumb_terminal


def say(console: Console, text: str, style: str = "") -> None:
    """Prints one line of foreign text as it is: no markup, no wrapping."""
    console.print(Text(printable(text, encoding=console.encoding), style=style), soft_wrap=True)


class RunView:
    """Shows one run. Call `start`, then the others in any order, `finish` at the end; or use it in a `with` block.

    log_every   without a terminal, one line for so many steps (and for the last one, and for skipped ones).
    """

    def __init__(self, *, log_every: int = 1, console: Console | None = None):
        self.console = console or Console()
        self.log_every = log_every
        self._live: Live | None = None
        self._total = self._first = self._done = 0
        self._began = self._last_line = time.monotonic()
        self._figures = self._score = ""
        cell = Column(no_wrap=True, overflow="crop")  # rich's ellipsis is not in every encoding
        self._bars = Progress(
            TextColumn("{task.description:<10}", markup=False, style="bold", table_column=cell.copy()),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[amount]:>9}", markup=False, table_column=cell.copy()),
            TextColumn("{task.fields[left]:>12}", markup=False, style="dim", table_column=cell.copy()),
            console=self.console,
        )
        self._steps_bar: TaskID | None = None
        self._phase_bar: TaskID | None = None
        self._phase = ""

    def start(self, total_steps: int, header: Sequence[str] = (), done: int = 0) -> None:
        """Prints the header lines. `total_steps` 0: no training, phases only. `done`: steps before a resume."""
        for line in header:
            say(self.console, line)
        self._total, self._first, self._done = total_steps, done, done
        self._began = self._last_line = time.monotonic()
        if is_live(self.console):
            if total_steps:
                self._steps_bar = self._bars.add_task(
                    "steps", total=total_steps, completed=done, amount=f"{done}/{total_steps}", left=""
                )
            self._live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """What is going on inside the step, or before and after the steps: `done` of `total`, where it can be said."""
        amount = "" if done is None else f"{done}/{total}" if total else f"{done}"
        if self._live:
            if self._phase_bar is None or name != self._phase:
                if self._phase_bar is not None:
                    self._bars.remove_task(self._phase_bar)  # a known total cannot be taken back
                shown = printable(name, encoding=self.console.encoding)[:20]
                self._phase_bar, self._phase = self._bars.add_task(shown, total=total, amount="", left=""), name
            self._bars.update(self._phase_bar, total=total, completed=done or 0, amount=amount)
        elif time.monotonic() - self._last_line > HEARTBEAT:
            self._line(f"{name} {amount}".rstrip())

    def step(self, line: Mapping[str, Any]) -> None:
        """One update is done. Reads `step` (how many are done, 1 after the first), `applied` (False: it was skipped),
        `reverse_kl` or `loss`, `reward_mean`, `tokens_per_second`; any but the first may be missing."""
        self._done = line["step"]
        name = next((key for key in HEADLINES if line.get(key) is not None), None)
        self._figures = f"{name.replace('_', ' ').replace('kl', 'KL')} {number(line[name])}" if name else ""
        if (reward := line.get("reward_mean")) is not None:
            self._figures = "  ".join(part for part in (self._figures, f"reward {number(reward)}") if part)
        rate = line.get("tokens_per_second")
        if rate is not None and math.isfinite(rate):
            self._figures += f"  {count(rate)} tokens/s"
        left = f"{duration(self._seconds_left())} left" if self._done < self._total else ""
        if self._live and self._steps_bar is not None:
            amount = f"{self._done}/{self._total}"
            self._bars.update(self._steps_bar, completed=self._done, amount=amount, left=left)
        skipped = line.get("applied") is False
        if skipped:
            self.message(f"step {self._done} skipped: its loss or gradient was not finite")
        elif not self._live and (self._done % self.log_every == 0 or self._done == self._total):
            width = len(str(self._total))
            parts = (f"step {self._done:>{width}}/{self._total}", self._figures.strip(), left)
            self._line("  ".join(part for part in parts if part))

    def eval(self, result: Mapping[str, Any]) -> None:
        """A task was taken. Reads `task`, `mean`, `low`, `high` (fractions), and `step` and `model` where given."""
        score = f"{percent(result['mean'])} {interval(result)}"
        who = f"{result.get('model', 'student')}" + (f" at step {result['step']}" if "step" in result else "")
        self._line(f"eval {result['task']}: {who} {score}", "cyan")
        if result.get("model", "student") == "student":
            self._score = printable(f"{result['task']} {score}", encoding=self.console.encoding)

    def message(self, text: str) -> None:
        """One line that stays, above the bars."""
        self._line(text, "yellow")

    def finish(self) -> None:
        """Takes the bars away and says how far the run came. Does nothing the second time."""
        if self._live:
            self._live.stop()
            self._live = None
        if self._done > self._first:
            spent = duration(time.monotonic() - self._began)
            self._line("  ".join(x for x in (f"{self._done}/{self._total} steps in {spent}", self._figures) if x))
            self._first = self._done

    def __enter__(self) -> RunView:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def _line(self, text: str, style: str = "") -> None:
        say(self.console, text, style)
        self._last_line = time.monotonic()

    def _seconds_left(self) -> float:
        """By the mean of all steps of this process, evaluations between them included."""
        each = (time.monotonic() - self._began) / max(self._done - self._first, 1)
        return each * (self._total - self._done)

    def _picture(self) -> Group:
        status = Text("   ".join(x for x in (self._figures, self._score) if x), overflow="crop", no_wrap=True)
        return Group(self._bars, status) if status.plain else Group(self._bars)
