"""An end for tests that start programs which may not end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the test when it takes longer than this."""

    def stop(*_):
        raise TimeoutError("a program was not stopped")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
