"""The scorers of a run: loaded, checked, kept up to date and kept in the checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from opd.config.schema import Config, Scorer
from opd.config.scorers import FIXED, all_scorers, examined, loaded_as, option_of
from opd.costs.size import ModelSize
from opd.models.adapters import adapter_off_view
from opd.models.causal import CausalLM
from opd.models.loading import load_frozen
from opd.teachers.as_read import scored_tokens
from opd.teachers.local import LocalTeacher
from opd.teachers.member import Member
from opd.teachers.moving import Moving
from opd.teachers.panel import Panel
from opd.teachers.residence import InHostMemory, Residence, resident
from opd.teachers.served.served import ServedTeacher
from opd.text.crossing import Crossing
from opd.types import Prompt
from opd.wiring.build import Texts, config_size, scorer_role
from opd.wiring.elsewhere import elsewhere


class Scorers:
    """What a run reads besides the student.

    panel    the scorers that something reads, by name.
    moving   those whose weights follow the student, by name.
    """

    def __init__(
        self,
        config: Config,
        texts: Texts,
        student: CausalLM,
        read: Mapping[str, Sequence[Prompt]],
        probes: int = 4,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        """Loads and checks one scorer after the other.

        student   before its first step: what is copied of it is the untrained student.
        read      scorer to the prompts it reads in training (`read_prompts`); the first `probes` of them try it out.
        on_wait   told in words when the run waits for a server.
        """
        self._config = config
        self.moving: dict[str, Moving] = {}
        self.served: dict[str, ServedTeacher] = {}
        members: list[Member] = []
        exam = examined(config)
        for name, scorer in all_scorers(config).items():
            if name not in read and name != exam:
                continue
            first = list(read.get(name, ()))[:probes]
            local = functools.partial(self._local, name, scorer, texts, student)
            if scorer.server is None and scorer.cache is None:
                member = local()
            else:
                member = elsewhere(config, name, texts, first, local=local, on_wait=on_wait)
                self.served[name] = member
            members.append(member)
            if first and not (scorer.cache is not None and scorer.cache.only):
                member.check(first)
            member.release()
        self.panel = Panel(members)
        self.unread = [name for name in all_scorers(config) if name not in self.panel.members]

    def _local(self, name: str, scorer: Scorer, texts: Texts, student: CausalLM) -> LocalTeacher:
        objective = self._config.objective
        return LocalTeacher(
            self._weights(name, scorer, student, scored_tokens(texts.agreements[name])),
            texts.scorers[name],
            texts.agreements[name],
            name=name,
            temperature=objective.teacher_temperature if scorer.temperature is None else scorer.temperature,
            chunk_tokens=self._config.learner.chunk_tokens,
            share_prompts=self._config.learner.share_prompts,
        )

    def _weights(self, name: str, scorer: Scorer, student: CausalLM, tokens: int) -> CausalLM | Residence:
        kind = scorer.weights
        if kind == "student":
            return student
        if kind == "adapter_off" or (kind == "initial" and student.adapter is not None):
            return adapter_off_view(student)  # an adapter begins as nothing
        if kind == "model" or kind == "initial":
            spec, role = loaded_as(self._config, scorer), scorer_role(self._config, name)
            return resident(functools.partial(load_frozen, spec, tokens, role=role), scorer.offload)
        moving = Moving(name, student, kind=kind, rate=scorer.ema_rate, every=scorer.every)
        self.moving[name] = moving
        away = scorer.offload == "cpu" and moving.model.device.type != "cpu"
        return InHostMemory(moving.model) if away else moving.model

    def close(self) -> None:
        """Ends what is under way to servers; files of scores are whole."""
        for member in self.served.values():
            member.close()

    # ---- facts ---------------------------------------------------------------------------------------------------

    @property
    def fixed(self) -> list[str]:
        """Scorers that no step changes."""
        scorers = all_scorers(self._config)
        return [name for name in self.panel.members if scorers[name].weights in FIXED]

    def fingerprints(self) -> dict[str, str]:
        """What must be the same when the run goes on: also the student's tokens, where they are joined with others."""
        found = {}
        for name in self.fixed:
            member = self.panel.members[name]
            crossed = f"-{member.agreement.fingerprint[:8]}" if isinstance(member.agreement, Crossing) else ""
            found[name] = f"{member.fingerprint}{crossed}"
        return found

    def changed(self) -> dict[str, float]:
        """Metrics: 1 where a scorer is not the one that the run began with, although no step changes it."""
        found = self.panel.changed(self.fixed)
        return {f"scorer/{name}/fingerprint_changed": float(changed) for name, changed in found.items()}

    def sizes(self) -> dict[str, ModelSize]:
        """For the bill."""
        specs = {name: loaded_as(self._config, scorer) for name, scorer in all_scorers(self._config).items()}
        return {
            name: config_size(specs[name], scorer_role(self._config, name), member.parameter_count)
            for name, member in self.panel.members.items()
        }

    def models(self) -> dict[str, str]:
        """How reports call the model of each scorer."""
        return {
            name: called(scorer) for name, scorer in all_scorers(self._config).items() if name in self.panel.members
        }

    def notes(self) -> list[str]:
        options = [option_of(self._config, name) for name in self.unread]
        said = [f"{name}: {note}" for name, member in self.served.items() for note in member.notes]
        return said + (
            [f"{', '.join(options)}: not loaded, because no prompt of this run asks for it"] if options else []
        )

    def here(self) -> dict[str, LocalTeacher]:
        """The scorers whose model is in this process: they can also write."""
        return {name: member for name, member in self.panel.members.items() if isinstance(member, LocalTeacher)}

    def metrics(self) -> dict[str, float]:
        """What scorers that are not read here alone have to say about themselves, e.g. scorer/NAME/cache_hits."""
        return {
            f"scorer/{name}/{key}": value
            for name, member in self.served.items()
            for key, value in member.metrics().items()
        }

    # ---- weights that follow the student -------------------------------------------------------------------------

    def after_update(self, step: int, *, applied: bool) -> None:
        """`step` steps are done; the last one changed the student, or did not."""
        for moving in self.moving.values():
            moving.after_update(step, applied=applied)

    @property
    def state_bytes(self) -> int:
        return sum(moving.state_bytes for moving in self.moving.values())

    def save(self, folder: Path) -> None:
        """Writes what follows the student into a checkpoint."""
        for moving in self.moving.values():
            moving.save(folder)

    def load(self, folder: Path) -> None:
        for moving in self.moving.values():
            moving.load(folder)


def called(scorer: Scorer) -> str:
    """What a scorer is, in words."""
    names = {
        "model": str(scorer.model),
        "student": "the student as it is now",
        "initial": "the student before training",
        "ema": f"the student's moving average (rate {scorer.ema_rate:g})",
        "past": f"the student of up to {scorer.every} steps ago",
        "adapter_off": "the student with its adapter off",
    }
    about = names[scorer.weights]
    if scorer.server is not None:
        about += f", served by {scorer.server.kind} at {scorer.server.url or 'its public address'}"
    if scorer.cache is not None and scorer.cache.only:
        about += f", as its scores in {scorer.cache.folder} say"
    return about if scorer.context == type(scorer.context)() else f"{about}, in a context of its own"
