"""Where figures are kept: bench/results/latest.json, and the numbers every comparison is told in."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LATEST = Path(__file__).parent / "results" / "latest.json"
RESAMPLES, CONFIDENCE = 10_000, 0.95


def ratio(ours: Sequence[float], peer: Sequence[float]) -> dict[str, Any]:
    """Pairs that were measured in turn: medians, and the median of peer / ours with a bootstrap interval over pairs."""
    ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    low, high = interval(ratios)
    return {
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "ratio_median": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "pairs": len(ratios),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap of the median."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    return medians[int(tail * RESAMPLES)], medians[int((1 - tail) * RESAMPLES) - 1]


def not_measured(reason: str) -> dict[str, str]:
    return {"status": "not_measured", "reason": reason}


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d")}


def record(path: Sequence[str], found: Mapping[str, Any], *, file: Path = LATEST) -> None:
    """Puts `found` at a place in the results, e.g. ("whole_step", "v408", "fp32"); everything else stays."""
    whole = json.loads(file.read_text()) if file.exists() else {"schema_version": 1}
    at = whole
    for key in path[:-1]:
        at = at.setdefault(key, {})
    at[path[-1]] = dict(found)
    whole["machine"] = machine()
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    fresh.replace(file)
