"""Every error that this package raises on purpose, in one tree.

``MicrovmError``
    ``ConfigError``     the caller asked for something that cannot be
    ``GuestError``      the guest's fault: it panicked, reset itself, went away
    ``HostError``       this machine's fault: no memory, no KVM, the VMM process was killed
    ``TimeoutError``    a deadline passed

A message says what failed, on what, and what to do, in one line. Whatever the guest said last on
its console and the report of the machine, where there is one, hang on the exception.
"""

from __future__ import annotations

import builtins

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class MicrovmError(Exception):
    """Base of all errors of this package.

    ``console``: what the guest last wrote to its console, or "" if there was no guest.
    ``report``: the machine's report (see :mod:`microvm.report`), or None.
    """

    def __init__(
        self, message: str, *, console: str = "", report: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.console = console
        self.report = report


class ConfigError(MicrovmError):
    """An option, a file or a combination of them cannot work; nothing was started."""


class GuestError(MicrovmError):
    """The guest failed; the host and this library are well."""


class PanicError(GuestError):
    """The guest's kernel panicked. The last lines of ``console`` say why."""


class TripleFaultError(GuestError):
    """The guest's CPU shut down: an exception while handling a double fault."""


class GuestGoneError(GuestError):
    """The guest ended while something was still expected of it.

    ``status``: the status with which it powered off or restarted in good order, None if it did
    not.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        console: str = "",
        report: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, console=console, report=report)
        self.status = status


class CommandError(GuestError):
    """A command ended with another status than 0 and ``check`` was asked for.

    ``returncode`` is its exit status, 128 + n if signal n ended it; ``stdout`` and ``stderr`` hold
    what was captured, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        returncode: int,
        stdout: bytes | None = None,
        stderr: bytes | None = None,
    ) -> None:
        super().__init__(message)
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


class HostError(MicrovmError):
    """This machine lacks something, or took it away."""


class AccelError(HostError):
    """The backend that was asked for does not work here; ``microvm doctor`` tells more."""


class VmmKilledError(HostError):
    """The VMM process ended without a word: somebody, or the kernel for want of memory, killed it.

    ``signal`` is the signal's number, or 0.
    """

    def __init__(
        self,
        message: str,
        *,
        signal: int = 0,
        console: str = "",
        report: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, console=console, report=report)
        self.signal = signal


class TimeoutError(MicrovmError, builtins.TimeoutError):
    """A deadline passed: in boot, or while a command ran. The guest has been ended."""
