"""How close a run came to what its machine could do, from the run's own record."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opd.config.schema import Config
from opd.costs.ledger import Ledger
from opd.costs.roofline import PHASES, limit
from opd.journal.reader import read_metrics
from opd.loop.synchronous import Rooms
from opd.models.rates import known_rates, rates_of
from opd.prompts.mixture import PromptStream
from opd.wiring.build import Texts
from opd.wiring.workload import STUDENT, Answers, workload

LONG = 60.0  # seconds, after which a run may spend two on measuring its machine


def achieved(
    config: Config,
    texts: Texts,
    prompts: PromptStream,
    folder: Path,
    ledger: Ledger,
    rooms: Callable[[], Rooms],
    *,
    measure: bool = False,
) -> dict[str, Any] | None:
    """The `limit` of a summary: see `journal.records.summary_record`.

    rooms     what the run was billed by.
    measure   take two seconds where the machine was never measured; else None, as for a run without a step.

    It is a remark about a run that is over: whatever goes wrong here, the run has its result, this is None, and a
    warning says why.
    """
    try:
        lines = [line for line in read_metrics(folder) if line.get("rollouts") and line.get("response_tokens")]
        spent = sum(ledger.seconds_by_phase.get(phase, 0.0) for phase in PHASES)
        if not lines or spent <= 0:
            return None
        number, tokens, longest = (
            sum(line[key] for line in lines) / len(lines)
            for key in ("rollouts", "response_tokens", "response_length_max")
        )
        answers = Answers(tokens=tokens / number, longest=longest, number=number)
        billed = rooms()
        sizes = {STUDENT: billed.student_size, **billed.scorer_sizes}
        step = workload(config, texts, prompts, answers, sizes=sizes, trainable=billed.trainable)
        rates = {}
        for name in step.devices:
            device = torch.device(name)
            rates[name] = rates_of(device) if measure else known_rates(device)
            if rates[name] is None:
                return None
        made = limit(step, rates)
    except Exception as error:
        warnings.warn(f"the share of this machine's limit is not known: {error!r}", RuntimeWarning, stacklevel=2)
        return None
    return {
        "seconds_per_step": made.seconds,
        "achieved": made.seconds * len(lines) / spent,
        "bottleneck": made.bottleneck.name,
        "bound": made.bottleneck.bound,
        "parts": made.by_phase(),
    }
