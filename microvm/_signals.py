"""The part of ``signal`` that we use, without its enums: importing those costs 3 ms."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from signal import (
        SIG_DFL,
        SIGHUP,
        SIGINT,
        SIGTERM,
        SIGWINCH,
        default_int_handler,
        getsignal,
        signal,
    )
else:
    from _signal import (
        SIG_DFL,
        SIGHUP,
        SIGINT,
        SIGTERM,
        SIGWINCH,
        default_int_handler,
        getsignal,
        signal,
    )

__all__ = [
    "SIGHUP",
    "SIGINT",
    "SIGTERM",
    "SIGWINCH",
    "SIG_DFL",
    "default_int_handler",
    "getsignal",
    "signal",
]
