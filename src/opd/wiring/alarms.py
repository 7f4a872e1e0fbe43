"""Guards over the record of a run: what they say is told once, also when the run is killed and goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd.config.schema import Config
from opd.journal.folder import RunFolder
from opd.journal.reader import read_metrics
from opd.journal.records import line
from opd.loop.guards import Alarm, guards_for
from opd.reports.progress import RunView


class Alarms:
    """Looks at the record after every step.

    stop     what a guard has said that is told to stop the run; None: nothing.
    before   the events that earlier processes of this run wrote. An alarm of a step that is done again is among them
             and is not written twice. Where the last step in the record has one that stops, and the run was killed
             before it had stopped, `stop` is set from the beginning.
    """

    def __init__(
        self, config: Config, folder: RunFolder, view: RunView, vocab_size: int, before: Sequence[Mapping[str, Any]]
    ) -> None:
        self.stop: str | None = None
        self._folder, self._view = folder, view
        self._guards = guards_for(config, vocab_size)
        self._history = read_metrics(folder.path)
        self._told = {(e["step"], e.get("guard"), e["message"]) for e in before if e["kind"] == "guard"}
        heeded = {e["step"] for e in before if e["kind"] in ("stop", "resume")}
        for step, alarm in self._look():
            if alarm.action == "stop" and step not in heeded and (step, alarm.guard, alarm.message) in self._told:
                self.stop = alarm.message

    def step(self, numbers: Mapping[str, Any]) -> None:
        """A step is in the record: its `step` and its metrics."""
        self._history.append(line(numbers))  # as it will be read back, so that a resumed run sees the same
        for step, alarm in self._look():
            if (step, alarm.guard, alarm.message) not in self._told:
                facts = {"guard": alarm.guard, "action": alarm.action, **alarm.facts}
                self._folder.log_event(step, "guard", alarm.message, **facts)
            self._view.message(f"guard {alarm.message}")
            if alarm.action == "stop":
                self.stop = alarm.message

    def _look(self) -> list[tuple[int, Alarm]]:
        """Alarms of the last step in the record, with the step."""
        return [(int(self._history[-1]["step"]), alarm) for alarm in self._guards.look(self._history)]
