"""Any number of scorers as one teacher: each reads the answers that it is asked about, and no others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from opd.teachers.member import Member, MemberEvidence
from opd.types import Batch, Rollout, ScorerRows, Spans, Want


class Panel:
    """Implements `opd.protocols.Teacher` for several scorers.

    members      by name, in the order in which they are pulled.
    fingerprint  of all of them.
    """

    name = "panel"

    def __init__(self, members: Iterable[Member]) -> None:
        listed = list(members)
        self.members = {member.name: member for member in listed}
        assert len(self.members) == len(listed), f"two scorers have one name: {[member.name for member in listed]}"
        self.fingerprint = "+".join(f"{member.name}:{member.fingerprint}" for member in listed)
        self.release()

    def evidence(self, rollouts_N: Sequence[Rollout]) -> PanelEvidence:
        """A lazy handle on what the scorers think of these rollouts; none of them comes to its device yet."""
        return PanelEvidence({name: member.evidence(rollouts_N) for name, member in self.members.items()})

    def changed(self, names: Iterable[str]) -> dict[str, bool]:
        """Whether each of these scorers is another than it was when it was made: weights, tokenizer, template,
        context or temperature."""
        found = {}
        for name in names:
            member = self.members[name]
            found[name] = member.fingerprint_now() != member.fingerprint
            member.release()
        return found

    def release(self) -> None:
        for member in self.members.values():
            member.release()


class PanelEvidence:
    """Evidence of a panel on one step's rollouts."""

    def __init__(self, parts: Mapping[str, MemberEvidence]) -> None:
        self._parts = parts
        self._asked: dict[str, MemberEvidence] = {}

    def spans(self) -> Mapping[str, Mapping[str, Spans]]:
        """See `protocols.EvidenceHandle`."""
        return {name: spans for part in self._parts.values() for name, spans in part.spans().items()}

    def prepare(self, wants: Mapping[str, Want]) -> int:
        """See `protocols.EvidenceHandle`."""
        return max((part.prepare(wants) for part in self._parts.values()), default=0)

    def pull(self, batch: Batch, wants: Mapping[str, Want]) -> list[ScorerRows]:
        """See `protocols.EvidenceHandle`. A scorer comes to its device when it is first asked."""
        unknown = sorted(wants.keys() - self._parts.keys())
        assert not unknown, f"nobody is called {', '.join(unknown)}; the scorers are {', '.join(self._parts)}"
        found = []
        for name, part in self._parts.items():
            if name in wants and (rows := part.read(batch, wants[name])) is not None:
                self._asked[name] = part
                found.append(rows)
        return found

    def lengths(self) -> Mapping[str, Sequence[int]]:
        """Scorer to the lengths of all sequences, prompt and answer, that it has read so far."""
        return {name: part.lengths()[name] for name, part in self._asked.items()}

    def release(self) -> None:
        for part in self._asked.values():
            part.release()
