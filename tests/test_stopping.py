"""When a request to stop is taken."""

from __future__ import annotations

import signal
import threading

import pytest

from opd.stopping import Stopping


def test_a_request_is_taken_at_once_where_the_state_is_whole() -> None:
    stopping = Stopping()
    with stopping.signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_waits_while_the_state_changes_and_a_second_one_does_not(number) -> None:
    stopping = Stopping()
    with stopping.signals():
        stopping.hold()
        signal.raise_signal(number)
        assert stopping.held
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert stopping.held, "who was interrupted here knows that nothing in memory is whole"
    stopping = Stopping()
    with stopping.signals():
        stopping.hold()
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            stopping.release()
        assert not stopping.held


def test_handlers_are_put_back_and_other_threads_touch_none() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stopping().signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    seen = []

    def elsewhere() -> None:
        with Stopping().signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
