"""What this machine's devices can do: product, memory and link rates, measured once and kept in the user's cache.

A rate is the best of several tries, because a limit is what the machine does when nothing is in the way.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from opd.costs.roofline import Rates
from opd.errors import OutOfSpace
from opd.journal.atomic import write_atomic
from opd.objectives.product import product

NEAR_BYTES = 16_000_000  # a size that last-level caches of servers and accelerators hold
SECONDS = 0.2  # of trying, for each figure
_CPU_SHAPES = ((512, 1024, 1024), (1024, 1024, 1024), (512, 256, 8192))  # rows, in, out
_CUDA_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192))
_VERSION = 1


def rates_of(device: torch.device, *, again: bool = False) -> Rates:
    """The device's rates from the cache; measured, which takes about two seconds, where they are not there."""
    known = None if again else known_rates(device)
    if known is None:
        known = measure(device)
        _keep(device, known)
    return known


def known_rates(device: torch.device) -> Rates | None:
    """What was measured before on this device with these threads and this torch; None: nothing that can be read."""
    try:
        found = _read()[_key(device)]
        return Rates(
            products={dtype: float(rate) for dtype, rate in found["products"].items()},
            memory=float(found["memory"]),
            near=float(found["near"]),
            near_bytes=int(found["near_bytes"]),
            link=None if found["link"] is None else float(found["link"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def cache_file() -> Path:
    """Where rates are kept: $XDG_CACHE_HOME/opd/rates.json, or the one in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opd" / "rates.json"


def device_name(device: torch.device) -> str:
    """What the device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@torch.no_grad()
def measure(device: torch.device) -> Rates:
    """All rates of a device, now. RuntimeError where the device has no memory left for it."""
    shapes = _CUDA_SHAPES if device.type == "cuda" else _CPU_SHAPES
    products = {
        name: max(_product_rate(dtype, shape, device) for shape in shapes)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    memory = _memory_rate(16 * NEAR_BYTES, device)
    near = max(memory, _memory_rate(NEAR_BYTES, device))
    return Rates(products=products, memory=memory, near=near, near_bytes=NEAR_BYTES, link=_link_rate(device))


def _product_rate(dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> float:
    """FLOP/s of a linear layer, by the faster of the ways that the library has."""
    rows, inner, outer = shape
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(outer, inner, device=device).to(dtype)
    ways = (lambda: torch.nn.functional.linear(x, weight), lambda: product(x, weight))
    share = SECONDS / len(ways)
    return 2.0 * rows * inner * outer / min(_least_seconds(way, device, share) for way in ways)


def _memory_rate(size: int, device: torch.device) -> float:
    """bytes/s of reading `size` bytes, or of copying half of them: whichever is faster."""
    whole = torch.ones(size // 4, device=device)
    half = len(whole) // 2
    source, target = whole[:half], whole[half : 2 * half]
    reading = _least_seconds(lambda: whole.sum(), device, SECONDS / 2)
    copying = _least_seconds(lambda: target.copy_(source), device, SECONDS / 2)
    return size / min(reading, copying)


def _link_rate(device: torch.device) -> float | None:
    """bytes/s from pinned host memory to the device; None on the host itself."""
    if device.type != "cuda":
        return None
    source = torch.ones(16 * NEAR_BYTES // 4, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return 4 * len(source) / _least_seconds(lambda: target.copy_(source, non_blocking=True), device, SECONDS)


def _least_seconds(work: Callable[[], Any], device: torch.device, share: float) -> float:
    """Seconds of the fastest of as many tries as go into `share` seconds, at least three."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    finish()
    best, tries, end = float("inf"), 0, time.perf_counter() + share
    while tries < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        finish()
        best = min(best, time.perf_counter() - start)
        tries += 1
    return best


def _key(device: torch.device) -> str:
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{device_name(device)}{threads}, torch {torch.__version__}"


def _read() -> dict[str, Any]:
    found = json.loads(cache_file().read_text(encoding="utf-8"))
    if found["schema_version"] != _VERSION:
        raise ValueError("another version's")
    return found["rates"]


def _keep(device: torch.device, rates: Rates) -> None:
    """A cache that cannot be written costs a measurement the next time, and nothing else."""
    try:
        kept = dict(_read())
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    kept[_key(device)] = {**vars(rates), "products": dict(rates.products)}
    path = cache_file()
    with suppress(OSError, OutOfSpace):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"schema_version": _VERSION, "rates": kept}, indent=1).encode())
