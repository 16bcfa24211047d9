"""What a run tells whoever watches: phases, progress, rows of metrics. This one says nothing."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

Row = dict[str, float]
"""One row of metrics: step, tokens, fvu, l0, dead, loss, lr, tokens_per_second, seconds, and what
the architecture logs.
"""


class Watch:
    """Subclass this to see a run."""

    def note(self, line: str) -> None:
        """Something happened once."""

    def phase(self, name: str, total: int | None, done: int = 0, unit: str = "tokens") -> None:
        """What is done from now on, and how much of it there is."""

    def progress(self, done: int) -> None:
        """How much of the phase is done."""

    def row(self, row: Row) -> None:
        """Metrics of the last steps."""

    def close(self) -> None:
        """The run ended, well or not."""


class Stop:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Inside, Ctrl-C and SIGTERM ask the run to stop at its next safe moment; a second one
        stops it at once. Only the main thread can listen.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def ask(number: int, _frame: object) -> None:
            self.signal = number
            for name, handler in before.items():
                signal.signal(name, handler)

        before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
        for name in before:
            signal.signal(name, ask)
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)
