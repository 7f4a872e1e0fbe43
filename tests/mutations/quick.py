"""A pytest plugin for runs on a seeded fault: one failing case of a test will do, and nobody reads small examples."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings

PROFILE = "mutants"
settings.register_profile(
    PROFILE, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False
)
failed: set[str] = set()


def test_of(nodeid: str) -> str:
    """The test function of a case."""
    return nodeid.partition("[")[0]


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """True: the case is done with."""
    return True if test_of(item.nodeid) in failed else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        failed.add(test_of(report.nodeid))
