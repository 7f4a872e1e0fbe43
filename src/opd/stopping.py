"""A request to stop (Ctrl-C, SIGTERM): taken at once, except while the student is between two states.

A step may be broken off anywhere before the student changes: nothing is lost, since a resumed run replays it from its
start. From the first change until the step is in the record, the request waits. So a run can always stop where a
checkpoint can be written. A second request is taken at once, wherever it falls.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopping:
    """Turns signals into KeyboardInterrupt, now or at the next `release`.

    held   the student is being changed or the record written: what is in memory is no state to go on from.
    """

    def __init__(self) -> None:
        self.held = False
        self._asked = 0

    def request(self, *_: Any) -> None:
        """A signal handler."""
        self._asked += 1
        if self._asked > 1 or not self.held:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """From here on a first request waits."""
        self.held = True

    def release(self) -> None:
        """The state is whole again. Raises KeyboardInterrupt when a request has come meanwhile."""
        self.held = False
        if self._asked:
            raise KeyboardInterrupt

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM come here for a while (only the main thread can say so)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
