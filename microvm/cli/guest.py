"""What ``run`` and ``shell`` share: options that describe a guest, and one command in it."""

from __future__ import annotations

import os
from time import monotonic

from microvm._signals import SIGINT, default_int_handler, signal
from microvm.cli import PROCESS_START, complain, say
from microvm.cli.options import Option, UsageError, whole_number
from microvm.config import ACCELS, parse_duration, parse_size
from microvm.errors import GuestGoneError, HostError, MicrovmError, TimeoutError

_BOOT_TIMEOUT = 300.0  # seconds without --timeout: far beyond any boot that still gets somewhere

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from microvm import Machine
    from microvm.cli.options import Parsed
    from microvm.command import Command


def _size(text: str) -> int:
    return parse_size(text, "--memory")


def _timeout(text: str) -> float:
    return parse_duration(text, "--timeout")


def _accel(text: str) -> str:
    if text not in ACCELS:
        raise UsageError(f"--accel {text!r} is not known: {', '.join(ACCELS)}")
    return text


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--env {text!r} is not NAME=VALUE")
    return name, value


OPTIONS = (
    Option(
        names=("-m", "--memory"),
        metavar="SIZE",
        convert=_size,
        help="RAM of the guest; default 256M",
    ),
    Option(
        names=("-c", "--cpus"),
        metavar="N",
        convert=whole_number("--cpus"),
        help="vCPUs; default 1, more need KVM",
    ),
    Option(
        names=("-e", "--env"),
        metavar="K=V",
        convert=_assignment,
        repeats=True,
        help="environment variable for the command; may be repeated",
    ),
    Option(
        names=("-w", "--workdir"),
        metavar="DIR",
        help="directory to start in; default: the user's home",
    ),
    Option(
        names=("-u", "--user"), metavar="USER", help="user in the guest, USER[:GROUP]; default root"
    ),
    Option(
        names=("--timeout",),
        metavar="TIME",
        convert=_timeout,
        help="deadline for boot and command together: 30s, 2m; exit code 124",
    ),
    Option(
        names=("--accel",),
        metavar="HOW",
        convert=_accel,
        help="auto, kvm or dbt (our translator); default auto: see microvm doctor",
    ),
    Option(
        names=("--kernel",),
        metavar="FILE",
        help="vmlinux or bzImage, or a name that microvm kernel ls shows",
    ),
    Option(names=("--initrd",), metavar="FILE", help="initramfs in place of ours"),
    Option(
        names=("--cmdline",),
        metavar="WORDS",
        help="words to append to the kernel's command line",
    ),
    Option(names=("--root",), metavar="IMAGE", help="raw ext4 image as the root file system"),
    Option(names=("--console",), help="show the guest's console as it comes, on stderr"),
    Option(
        names=("--report",),
        metavar="FILE",
        help="write a JSON report: timeline, exits, which backend and why",
    ),
    Option(
        names=("--count",), help="count guest instructions, for --report (translator only; slower)"
    ),
    Option(names=("-q", "--quiet"), help="no notes, only errors"),
    Option(names=("--dry-run",), help="say what would be started, and start nothing"),
)


class ReportFile:
    """The file of ``--report``: opened before the guest starts, so a bad name costs nothing."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._fd = -1
        if path:
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise UsageError(f"--report {path}: {error.strerror}") from error

    def write(self, machine: Machine) -> None:
        """Writes the report. Raises ``HostError`` if it does not fit."""
        if self._fd < 0:
            return
        from microvm.report import to_json

        try:
            with open(self._fd, "wb") as file:
                self._fd = -1
                if os.path.isfile(file.fileno()):
                    file.truncate(0)
                file.write(to_json(machine.report()))
        except OSError as error:
            raise HostError(f"--report {self._path}: {error.strerror}") from error


def main(parsed: Parsed, argv: list[str]) -> int:
    """Starts the guest, runs ``argv`` in it, ends it; the exit code."""
    from microvm.machine import Machine

    timeout = parsed.values.get("timeout")
    deadline = None if timeout is None else monotonic() + float(str(timeout))
    boot_timeout = _BOOT_TIMEOUT if timeout is None else timeout
    names = ("memory", "cpus", "accel", "kernel", "initrd", "cmdline", "root", "count")
    options = {name: parsed.values[name] for name in names if name in parsed.values}
    machine = Machine(
        **options,
        boot_timeout=boot_timeout,
        console_fd=2 if parsed.flag("console") else None,
        epoch=PROCESS_START,
    )
    if parsed.flag("dry_run"):
        say(machine.plan().describe())
        return 0
    report = ReportFile(parsed.text("report"))
    try:
        with machine:
            code = _command(machine, parsed, argv, deadline)
    except MicrovmError as error:
        try:
            report.write(machine)
        except HostError as second:
            complain(str(second))
        if parsed.flag("console"):
            error.console = ""  # it has been shown
        raise error
    report.write(machine)
    return code


def _command(machine: Machine, parsed: Parsed, argv: list[str], deadline: float | None) -> int:
    env = dict(parsed.values.get("env") or ())  # type: ignore[call-overload]
    about = {"env": env, "cwd": parsed.text("workdir") or "", "user": parsed.text("user") or ""}
    machine.start()
    left = None if deadline is None else max(0.001, deadline - monotonic())
    try:
        if os.isatty(0) and os.isatty(1):
            done = machine.interact(argv, timeout=left, **about)
            if done.escaped and not parsed.flag("quiet"):
                complain("session ended", new_line=True)
            return done.returncode
        pass_to = _pass_interrupts()
        with machine.spawn(argv, stdin=0, stdout=1, stderr=2, **about) as command:
            pass_to(command)
            return command.wait(left).returncode
    except TimeoutError:
        limit = parsed.values["timeout"]
        raise TimeoutError(f"{argv[0]!r} was still running after {limit:g} s") from None
    except GuestGoneError as gone:
        if gone.status is None:
            raise
        return gone.status


def _pass_interrupts() -> Callable[[Command], None]:
    """The first Ctrl-C is the command's; the second one ends us.

    Gives a function that names the command. An interrupt that comes before, because the command
    runs as soon as it is asked for, is kept until then.
    """
    commands: list[Command] = []
    early: list[int] = []

    def on_interrupt(signo: int, _frame: object) -> None:
        signal(SIGINT, default_int_handler)
        if commands:
            commands[0].signal(SIGINT)
        else:
            early.append(signo)

    def name(command: Command) -> None:
        commands.append(command)
        if early:
            command.signal(SIGINT)

    signal(SIGINT, on_interrupt)
    return name
