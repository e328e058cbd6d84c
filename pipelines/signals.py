"""What SIGINT and SIGTERM do while a command works."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn


def ending_in_order() -> AbstractContextManager[None]:
    """Lets SIGTERM end the process as an exception does, so that no process and no copy is left behind."""

    def end(number: int, _: object) -> None:
        end_by(number)

    return handling(end, signal.SIGTERM)


def end_by(number: int) -> NoReturn:
    """Ends as a process does that knows nothing of the signal: with 130 after SIGINT, 143 after SIGTERM."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def handling(handler: Callable[..., object], *numbers: signal.Signals) -> Iterator[None]:
    """Has signals handled otherwise; not outside the main thread, which alone may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, handler)) for number in numbers]
    try:
        yield
    finally:
        for number, earlier in before:
            signal.signal(number, earlier)
