"""Applies every seeded fault to a copy of the source and runs the tests that must fail.

    python -m tests.mutations.run [--wide] [--jobs N] [NAME ...]

--wide runs all tests of the objective as well, and says which others noticed. NAME is a part of a fault's file or name.
Exit status 1 when a test that is named for a fault passes, or one of them fails without a fault.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutations import quick
from tests.mutations.fault import FAULTS, SOURCE, TESTS, Fault

OPTIONS = (
    *("--tb=no", "-rfE", "-q", "-n", "0", "-p", "no:cacheprovider", "--disable-warnings"),
    *("-p", quick.__name__, f"--hypothesis-profile={quick.PROFILE}"),
)
SHOWN = 800  # characters of what pytest said where it did not just fail
WIDE = ("objectives", "oracle", "learner", "config")
FAILED = re.compile(r"^(?:FAILED|ERROR) (?:.*?tests/)?(\S+?)(?:\[.*)?(?: - .*)?$", re.MULTILINE)
# A fault that does not even run says nothing about the tests.
CRASHED = re.compile(r"^(?:FAILED|ERROR) .* - (?:Name|Attribute|Type|Import|Syntax|UnboundLocal)Error.*$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What became of one fault. failed: all tests that failed; missed: those that were named and passed."""

    fault: Fault
    failed: tuple[str, ...]
    missed: tuple[str, ...]
    said: str
    seconds: float


def healthy(faults: Sequence[Fault]) -> str:
    """What fails already without a fault, among the tests that are named for these; "" when nothing does."""
    with copy() as source:
        done = run(source, sorted({str(TESTS / name) for fault in faults for name in fault.caught}))
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-SHOWN:]


def check(fault: Fault, *, wide: bool) -> Outcome:
    """Runs the tests of one fault against a copy that has it."""
    began = time.monotonic()
    with copy() as source:
        try:
            fault.apply(source)
        except ValueError as error:
            return Outcome(fault, (), fault.caught, str(error), 0.0)
        done = run(source, [str(TESTS / name) for name in (WIDE if wide else fault.caught)])
    failed = tuple(dict.fromkeys(FAILED.findall(done.stdout)))
    missed = tuple(name for name in fault.caught if name not in failed)
    crash = CRASHED.search(done.stdout)
    fine = done.returncode == 1 and crash is None
    said = "" if fine else crash[0] if crash else (done.stdout + done.stderr)[-SHOWN:]
    return Outcome(fault, failed, missed if fine else fault.caught, said, time.monotonic() - began)


@contextmanager
def copy() -> Iterator[Path]:
    """A copy of `src` in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="opd-mutant-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        yield source


def run(source: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own that imports opd from `source`."""
    here = {"PYTHONPATH": f"{source}{os.pathsep}{TESTS.parent}", "HYPOTHESIS_STORAGE_DIRECTORY": f"{source}/.examples"}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": "1"}
    where = "import opd, sys; sys.exit(opd.__file__ is None or not opd.__file__.startswith(sys.argv[1]))"
    environment = {**os.environ, **here, **threads}
    subprocess.run([sys.executable, "-c", where, str(source)], env=environment, cwd=source, check=True)
    command = [sys.executable, "-m", "pytest", f"--rootdir={TESTS.parent}", f"--confcutdir={TESTS}", *tests, *OPTIONS]
    return subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    chosen = [f for f in FAULTS if not given.names or any(name in f"{f.file}: {f.name}" for name in given.names)]
    if broken := healthy(chosen):
        print(f"tests fail without any fault, so that they say nothing about one:\n{broken}")
        return 1
    survived = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for outcome in pool.map(lambda fault: check(fault, wide=given.wide), chosen):
            survived += bool(outcome.missed)
            verdict = "MISSED" if outcome.missed else "caught"
            print(f"{verdict}  {outcome.seconds:5.1f} s  {outcome.fault.file}: {outcome.fault.name}", flush=True)
            for name in outcome.failed:
                print(f"          by {name}", flush=True)
            for name in outcome.missed:
                print(f"          NOT by {name}", flush=True)
            if outcome.said:
                print(outcome.said, flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} faults are caught by every test that is named for them")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
