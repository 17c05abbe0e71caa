"""The caller's terminal, lent to a command in the guest.

The guest's terminal does the editing, so ours is put into raw mode and every key goes to the
guest, except Ctrl-] (as in telnet), which ends the session. Output does not pass through here: the
VMM writes it to the terminal by itself. Whatever happens, the terminal is given back as it was.
"""

from __future__ import annotations

import os
import termios
from fcntl import ioctl
from struct import unpack

from microvm._signals import SIGHUP, SIGWINCH, default_int_handler, getsignal, signal
from microvm.command import Completed
from microvm.errors import TimeoutError
from microvm.session import WindowSize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from microvm.command import Command

ESCAPE = b"\x1d"  # Ctrl-]
_CHUNK = 4096
_HANGUP = 0.5  # seconds for a command to end when it is hung up


def window_size(fd: int) -> WindowSize:
    """The size of the terminal ``fd``; 24 x 80 if it does not know."""
    try:
        rows, cols, xpixel, ypixel = unpack("HHHH", ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    except OSError:
        rows = cols = xpixel = ypixel = 0
    return WindowSize(rows=rows or 24, cols=cols or 80, xpixel=xpixel, ypixel=ypixel)


class RawTerminal:
    """Raw mode for as long as the ``with`` lasts."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved = termios.tcgetattr(fd)

    def __enter__(self) -> RawTerminal:
        raw = termios.tcgetattr(self._fd)
        raw[0] &= ~(
            termios.BRKINT
            | termios.ICRNL
            | termios.INLCR
            | termios.IGNCR
            | termios.INPCK
            | termios.ISTRIP
            | termios.IXON
        )
        raw[1] &= ~termios.OPOST
        raw[2] = raw[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        raw[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        raw[6][termios.VMIN] = 1
        raw[6][termios.VTIME] = 0
        termios.tcsetattr(self._fd, termios.TCSADRAIN, raw)
        return self

    def __exit__(self, *_exc: object) -> None:
        # Not TCSADRAIN: a terminal whose flow is stopped must not keep us from leaving.
        termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)


class _Escaped(Exception):
    """Ctrl-] was typed."""


class Keyboard:
    """Carries keys from the terminal to the command's terminal.

    A command that takes no input loses what is typed beyond a pipe's 64 KiB, so that Ctrl-] gets
    through; a terminal's own queue holds less. ``reader`` is the descriptor for the command's
    stdin.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    def serve(self, command: Command, timeout: float | None) -> Completed:
        """Carries until the command has ended, or Ctrl-] ends it."""
        os.close(self.reader)
        self.reader = -1
        command.watch(self._fd, lambda: self._carry(command))
        try:
            return command.wait(timeout)
        except _Escaped:
            return self._escape(command)

    def _carry(self, command: Command) -> None:
        try:
            keys = os.read(self._fd, _CHUNK)
            keys, escape, _ = keys.partition(ESCAPE)
            if keys:
                os.write(self._writer, keys)
        except BlockingIOError:
            return
        except OSError:  # the terminal went away, or the command takes no more input
            keys, escape = b"", b""
        if escape:
            raise _Escaped
        if not keys:
            command.unwatch(self._fd)
            os.close(self._writer)
            self._writer = -1

    def _escape(self, command: Command) -> Completed:
        """Hangs the command up, and does not wait long for it."""
        command.unwatch(self._fd)
        command.hangup()
        try:
            return command.wait(_HANGUP).replace(escaped=True)
        except TimeoutError:
            return Completed(args=(), returncode=128 + SIGHUP, escaped=True)

    def __enter__(self) -> Keyboard:
        return self

    def __exit__(self, *_exc: object) -> None:
        for fd in (self.reader, self._writer):
            if fd >= 0:
                os.close(fd)
        self.reader = self._writer = -1


class WindowWatch:
    """Tells the command each new size of the terminal while the ``with`` lasts.

    Signals can be caught on the main thread only; elsewhere this does nothing.
    """

    def __init__(self, fd: int, command: Command) -> None:
        self._fd = fd
        self._command = command
        self._before: Callable[..., object] | int | None = default_int_handler

    def __enter__(self) -> WindowWatch:
        try:
            self._before = getsignal(SIGWINCH)
            signal(SIGWINCH, lambda *_: self._command.resize(window_size(self._fd)))
            self._command.resize(window_size(self._fd))  # it may have changed since the start
        except ValueError:
            self._before = None
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._before is not None:
            signal(SIGWINCH, self._before)
