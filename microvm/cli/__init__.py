"""The ``microvm`` command: verbs, exit codes, and all that is ever printed.

Exit codes: the guest command's own; 128 + n if signal n ended it or us; 127 not found and 126 not
executable in the guest; 125 anything that went wrong on our side or with the guest; 124 a deadline.

The way from here to the guest's first instruction is short on purpose: each verb imports what it
uses, when it uses it (``tests/unit/test_startup.py`` holds the list).
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from time import monotonic_ns, process_time_ns

from microvm._signals import SIG_DFL, SIGHUP, SIGTERM, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

#: CLOCK_MONOTONIC ns at which this process began: now, less what it has computed so far.
PROCESS_START = monotonic_ns() - process_time_ns()

EXIT_FAILURE = 125
EXIT_DEADLINE = 124

_VERBS = {
    "shell": "a Linux shell in a fresh guest",
    "run": "one command in a fresh guest",
    "doctor": "what this machine offers, and what would be used",
    "kernel": "guest kernels: ls, pull, build, import, rm",
}


class Ended(BaseException):  # not an error: nothing on the way out may swallow it
    """A signal asks this process to end; everything is closed on the way out."""

    def __init__(self, signo: int) -> None:
        super().__init__(signo)
        self.signo = signo


def _on_signal(signo: int, _frame: object) -> None:
    signal(signo, SIG_DFL)
    raise Ended(signo)


def complain(message: str, *, new_line: bool = False) -> None:
    """One line on stderr. ``new_line``: the cursor may stand behind a prompt of the guest."""
    start = "\n" if new_line else ""
    with suppress(OSError):
        sys.stderr.write(f"{start}microvm: {message}\n")
        sys.stderr.flush()


def say(text: str) -> None:
    """Text on stdout. Raises ``HostError`` if that is full, and ``Ended`` if nobody reads it."""
    from microvm.errors import HostError

    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise Ended(13) from None
    except OSError as error:
        raise HostError(f"stdout: {error.strerror}") from error


def usage() -> str:
    """The text of ``microvm --help``."""
    verbs = "\n".join(f"  {name:<10}{what}" for name, what in _VERBS.items())
    return f"""\
Linux in a micro-VM, at once: no daemon, no root, no /dev/kvm needed.

usage: microvm VERB [OPTIONS] ...

{verbs}

  microvm shell                         a shell; Ctrl-] ends it
  microvm run -- uname -a               one command
  echo hi | microvm run -- wc -c        in a pipe
  microvm VERB --help                   more, with examples
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit code. Prints one line for whatever goes wrong."""
    signal(SIGTERM, _on_signal)
    signal(SIGHUP, _on_signal)
    _fill_standard_descriptors()
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return 130
    except Ended as end:
        return 128 + end.signo
    except Exception as error:
        return _explain(error)


def _fill_standard_descriptors() -> None:
    """With stdin closed (``<&-``) the next thing opened would be taken for it: /dev/null is."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 (as long as we live)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def entry() -> NoReturn:
    """The console script. It does not tear the interpreter down, which costs 4 ms."""
    code = main()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _dispatch(argv: list[str]) -> int:
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help", "help"):
        say(usage())
        return 0 if argv else EXIT_FAILURE
    if verb in ("-V", "--version", "version"):
        from microvm import __version__

        say(f"microvm {__version__}")
        return 0
    if verb not in _VERBS:
        complain(f"no verb {verb!r}: {', '.join(_VERBS)}, or --help")
        return EXIT_FAILURE
    from microvm.cli.options import Help

    try:
        return _run_verb(verb, argv[1:])
    except Help as wanted:
        say(str(wanted))
        return 0


def _run_verb(verb: str, argv: list[str]) -> int:
    if verb == "run":
        from microvm.cli import run

        return run.main(argv)
    if verb == "shell":
        from microvm.cli import shell

        return shell.main(argv)
    if verb == "doctor":
        from microvm.cli import doctor

        return doctor.main(argv)
    from microvm.cli import kernel

    return kernel.main(argv)


def _explain(error: Exception) -> int:
    """Prints what went wrong; the exit code for it."""
    from microvm.errors import CommandError, MicrovmError, TimeoutError

    if isinstance(error, MemoryError):
        complain("this host gives us no more memory")
        return EXIT_FAILURE
    if not isinstance(error, MicrovmError):
        if os.environ.get("MICROVM_DEBUG"):
            raise error
        complain(
            f"internal error: {type(error).__name__}: {error} "
            "(MICROVM_DEBUG=1 shows where; please report it)"
        )
        return EXIT_FAILURE
    if error.console:
        from microvm.cli.console import tail

        sys.stderr.write(tail(error.console))
    complain(str(error))
    if isinstance(error, CommandError):
        return error.returncode
    return EXIT_DEADLINE if isinstance(error, TimeoutError) else EXIT_FAILURE
