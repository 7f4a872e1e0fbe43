"""Which divergence a loss function follows, whether the teacher is in it, what its masks let through."""

from opd.objectives.audit.calling import LossFunction
from opd.objectives.audit.findings import Findings, Match
from opd.objectives.audit.run import audit

__all__ = ["Findings", "LossFunction", "Match", "audit"]
