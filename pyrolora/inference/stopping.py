"""A fit that is asked to stop, by SIGTERM or control and C, does so after a step that is saved."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainingArguments

TERMINATED = 128 + signal.SIGTERM
"""The exit status of a process that SIGTERM has ended."""


class Stop:
    """Whether a signal has asked the fit to stop.

    Parameters
    ----------
    saves
        Whether the fit can save a step; else the signal acts as it does without this.
    """

    def __init__(self, *, saves: bool) -> None:
        self.saves = saves
        self._signal: int | None = None

    @property
    def is_asked(self) -> bool:
        """Whether to stop after this step."""
        return self._signal is not None

    def __call__(self, number: int, frame: Any = None) -> None:
        """Take a signal; the second one acts at once."""
        if self.is_asked or not self.saves:
            _end(number, "stopped at once")
        self._signal = number

    def obey(self, saved: str) -> None:
        """End the fit, if that was asked for, and say what is saved."""
        if self._signal is not None:
            number, self._signal = self._signal, None
            _end(number, f"{saved}; resume_from_checkpoint='auto' goes on from there")


@contextmanager
def stopping(args: TrainingArguments) -> Iterator[Stop]:
    """Have SIGTERM and control and C ask for a stop for the block, in which steps are made.

    That is so where checkpoints are saved, by one process and in its main thread, and where the
    program has no handler of its own. A signal after the last step ends the fit after the block.
    """
    alone = args.world_size == 1 and threading.current_thread() is threading.main_thread()
    stop = Stop(saves=alone and args.save_strategy != "no")
    usual: dict[int, Any] = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    taken = [n for n, handler in usual.items() if stop.saves and signal.getsignal(n) == handler]
    try:
        for number in taken:
            signal.signal(number, stop)
        yield stop
    finally:
        for number in taken:
            signal.signal(number, usual[number])
    stop.obey(f"the steps in {args.output_dir} are done")


def _end(number: int, message: str) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message)
    try:
        warnings.warn(f"{signal.Signals(number).name}: {message}", stacklevel=2)
    except UserWarning as warning:  # under python -W error; the exit status has to stay
        print(warning, file=sys.stderr)
    raise SystemExit(TERMINATED)
