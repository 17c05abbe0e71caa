"""A progress bar on stderr for what takes more than a second."""

from __future__ import annotations

import sys
from time import monotonic

_PATIENCE = 1.0  # seconds before anything is shown
_PAUSE = 0.1  # seconds between two pictures
_WIDTH = 30


class Bar:
    """Called with (what, done, total); use it in a ``with`` so that the line is cleared.

    Without a terminal each new ``what`` gets one line. ``quiet`` shows nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._begin = self._last = monotonic()
        self._what = ""
        self._shown = False

    def __call__(self, what: str, done: int, total: int) -> None:
        now = monotonic()
        if self._quiet or now - self._begin < _PATIENCE:
            return
        if not self._live:
            if what != self._what:
                self._write(f"{what} ...\n")
        elif what != self._what or now - self._last >= _PAUSE:
            self._last = now
            self._write(f"\r\033[K{_picture(what, done, total)} {now - self._begin:.0f} s")
            self._shown = True
        self._what = what

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._shown:
            self._write("\r\033[K")


def _picture(what: str, done: int, total: int) -> str:
    if total <= 0:
        return f"{what:<32.32} {done}"
    part = min(max(done / total, 0.0), 1.0)
    return f"{what:<32.32} [{'#' * int(part * _WIDTH):<{_WIDTH}}] {part:4.0%}"
