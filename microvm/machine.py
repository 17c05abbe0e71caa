"""A machine: started, given commands, ended; it owns all that belongs to it."""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_STREAM, socketpair
from time import monotonic, monotonic_ns, time_ns

from microvm import control, layout
from microvm.command import Command, Completed, Sink, Source
from microvm.config import machine_config
from microvm.errors import (
    ConfigError,
    GuestGoneError,
    HostError,
    MicrovmError,
    PanicError,
    TimeoutError,
    TripleFaultError,
    VmmKilledError,
)
from microvm.report import REASONS, Timeline, counters, exits
from microvm.session import Program, Session, control_prefix, open_session
from microvm.vmm import Vmm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from microvm.plan import Plan
    from microvm.session import WindowSize

_LAST_WORDS = 2.0  # seconds that a VMM gets to say how its guest ended
_ORDERLY = 8.0  # seconds that a guest gets to power off


class Machine:
    """One guest.

    >>> with Machine(memory="256M") as vm:
    ...     vm.run(["uname"], capture_output=True).stdout
    b'Linux\\n'

    Options are those of :class:`microvm.MachineConfig`; sizes and times may be written as "512M"
    and "30s". ``epoch``: CLOCK_MONOTONIC ns that the report counts from, now if it is None. Raises
    ``ConfigError`` for what cannot be. The guest starts with :meth:`start`, or by itself when the
    first command needs it, and ends with :meth:`close` or the ``with``.
    """

    def __init__(self, *, epoch: int | None = None, **options: Any) -> None:
        try:
            self.config = machine_config(**options)
        except TypeError as error:
            raise ConfigError(f"Machine: {error}") from error
        self._timeline = Timeline(monotonic_ns() if epoch is None else epoch)
        self._plan: Plan | None = None
        self._vmm: Vmm | None = None
        self._sessions = 0
        self._console = bytearray()
        self._stats: dict[str, int] = {}
        self._registers: dict[str, int] = {}
        self._exit: control.Event | None = None
        self._failure: MicrovmError | None = None
        self._agent_ready = False

    # ---- life ------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """What would be started: kernel, backend, memory layout. Starts nothing."""
        if self._plan is None:
            from microvm.plan import make_plan

            self._plan = make_plan(self.config)
        return self._plan

    def start(self) -> None:
        """Boots, and returns when the guest can be given commands; at once if it has.

        Raises ``TimeoutError`` after ``boot_timeout`` seconds, or what else went wrong.
        """
        if self._agent_ready:
            self._need_vmm()
            return
        limit = self.config.boot_timeout
        deadline = None if limit is None else monotonic() + limit
        try:
            self._boot()
            while not self._agent_ready:
                left = None if deadline is None else deadline - monotonic()
                if left is not None and not self._need_vmm().poll(left):
                    self._halt()
                    raise TimeoutError(
                        f"the guest had not booted after {limit:g} s",
                        console=self._last_console(),
                        report=self.report(),
                    )
                self._take(self._need_vmm().receive())
        except BaseException:
            self.close()
            raise

    def _boot(self) -> None:
        if self._vmm is None and self._exit is None:
            from microvm.plan import send_plan

            plan = self.plan()
            self._vmm = Vmm()
            send_plan(plan, self._vmm)

    def stop(self) -> None:
        """Lets the guest power off in good order; pulls the plug if it does not within 8 s."""
        if self._vmm is None or not self._agent_ready or self._exit:
            self.kill()
            return
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
        with Session(ours) as session:
            self._need_vmm().connect(
                layout.VSOCK_AGENT_PORT,
                control_prefix(self._next_session()),
                both=theirs.fileno(),
            )
            theirs.close()
            session.shutdown()
            self._drain(_ORDERLY)
        self.close()

    def kill(self) -> None:
        """Pulls the plug: what the guest has not written is lost."""
        self._halt()
        self.close()

    def close(self) -> None:
        """Ends the guest and everything that belongs to it. May be called again."""
        if self._vmm is not None:
            self._vmm.close()
            self._vmm = None

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: object, *_exc: object) -> None:
        writable_disk = self.config.root is not None and not self.config.root_readonly
        if kind is None and writable_disk:
            self.stop()
        else:
            self.kill()

    def _halt(self) -> None:
        """Pulls the plug and takes in what the VMM has to say about its guest."""
        if self._vmm is not None and self._exit is None and self._failure is None:
            self._vmm.send(control.stop())
            self._drain(_LAST_WORDS)

    def _drain(self, timeout: float) -> None:
        """Takes in events until the last one, ``timeout`` seconds at most."""
        deadline = monotonic() + timeout
        vmm = self._need_vmm()
        try:
            while self._exit is None and vmm.poll(deadline - monotonic()):
                self._take(vmm.receive())
        except MicrovmError:
            return  # kept in self._failure

    # ---- commands ----------------------------------------------------------------------------

    def spawn(
        self,
        argv: Sequence[str | bytes],
        *,
        stdin: int | bytes | None = None,
        stdout: int | Sink | None = None,
        stderr: int | Sink | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        window: WindowSize | None = None,
    ) -> Command:
        """Starts a command and returns at once.

        ``stdin``: a descriptor, or bytes to feed; ``stdout`` and ``stderr``: descriptors or sinks;
        None is /dev/null. The VMM uses its own copies of the descriptors. ``cwd``: "" is the
        user's home. ``user``: USER[:GROUP], "" is root. ``window``: gives the command a terminal
        of that size on stdin and stdout.
        """
        self.start()
        source = Source(stdin) if isinstance(stdin, bytes) else None
        sinks = [sink for sink in (stdout, stderr) if isinstance(sink, Sink)]
        program = Program(
            argv=tuple(argv),
            env=env or {},
            cwd=cwd,
            user=user,
            window=window,
            realtime=time_ns(),
        )
        stdio = (
            source.reader if source else stdin if isinstance(stdin, int) else -1,
            stdout.writer if isinstance(stdout, Sink) else -1 if stdout is None else stdout,
            stderr.writer if isinstance(stderr, Sink) else -1 if stderr is None else stderr,
        )
        done, done_writer = os.pipe()
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)

        def open_stream(port: int, prefix: bytes, in_fd: int, out_fd: int) -> None:
            self._open_stream(port, prefix, in_fd, out_fd, done_writer)

        try:
            session = open_session(
                open_stream, (ours, theirs.fileno()), self._next_session(), program, stdio
            )
        except BaseException as error:
            ours.close()
            os.close(done)
            if isinstance(error, ValueError):
                raise ConfigError(str(error)) from error
            raise
        finally:
            theirs.close()
            os.close(done_writer)
            for sink in sinks:
                sink.close_writer()
            if source:
                source.close_reader()
        return Command(
            self,
            session,
            program,
            done=done,
            source=source,
            stdout=stdout if isinstance(stdout, Sink) else None,
            stderr=stderr if isinstance(stderr, Sink) else None,
        )

    def run(
        self,
        argv: Sequence[str | bytes],
        *,
        input: bytes | None = None,
        capture_output: bool = False,
        timeout: float | None = None,
        check: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
    ) -> Completed:
        """Runs a command to its end, much like ``subprocess.run``.

        Its output goes to our stdout and stderr, or with ``capture_output`` into the result. stdin
        is ``input``, or empty. ``timeout``: seconds, starting when the guest is up; raises
        ``TimeoutError`` and hangs the command up. ``check``: raises ``CommandError`` for a status
        other than 0. A command that cannot be started raises ``CommandError`` always.
        """
        with self.spawn(
            argv,
            stdin=input,
            stdout=Sink() if capture_output else 1,
            stderr=Sink() if capture_output else 2,
            env=env,
            cwd=cwd,
            user=user,
        ) as command:
            done = command.wait(timeout)
        return done.check() if check else done

    def interact(
        self,
        argv: Sequence[str | bytes],
        *,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
    ) -> Completed:
        """Runs a command on the caller's terminal, which must be stdin and stdout.

        Ctrl-] ends it. ``TERM`` comes along, nothing else of our environment does.
        """
        from microvm.terminal import Keyboard, RawTerminal, WindowWatch, window_size

        term = os.environ.get("TERM")
        env = {**({"TERM": term} if term else {}), **(env or {})}
        self.start()  # while Ctrl-C still works
        with Keyboard(0) as keyboard, RawTerminal(0):
            command = self.spawn(
                argv,
                stdin=keyboard.reader,
                stdout=1,
                env=env,
                cwd=cwd,
                user=user,
                window=window_size(0),
            )
            with command, WindowWatch(0, command):
                return keyboard.serve(command, timeout)

    def shell(self) -> int:
        """The user's login shell on the caller's terminal; its exit status."""
        return self.interact(LOGIN_SHELL).returncode

    def _next_session(self) -> int:
        self._sessions += 1
        return self._sessions

    def _open_stream(
        self, port: int, prefix: bytes, in_fd: int, out_fd: int, done: int | None = None
    ) -> None:
        """A stream to the guest: one socket as both ends, or a descriptor a direction."""
        vmm = self._need_vmm()
        if in_fd == out_fd:
            vmm.connect(port, prefix, both=in_fd)
        else:
            vmm.connect(
                port,
                prefix,
                source=in_fd if in_fd >= 0 else None,
                sink=out_fd if out_fd >= 0 else None,
                done=done,
            )

    # ---- what the VMM says ---------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable: call :meth:`dispatch`."""
        return self._need_vmm().fileno()

    def dispatch(self) -> None:
        """Takes in what the VMM has said; raises if the guest is over."""
        while self._need_vmm().poll(0):
            self._take(self._need_vmm().receive())
        if self._failure:
            raise self._failure

    def explain(self) -> None:
        """The guest went silent: waits for the VMM's last words; raises if there are any."""
        self._drain(_LAST_WORDS)
        if self._failure:
            raise self._failure

    def _need_vmm(self) -> Vmm:
        if self._vmm is None:
            raise self._failure or HostError("the machine is not running")
        return self._vmm

    def _take(self, event: control.Event | None) -> None:
        """Takes in one event; raises if it is the last and nobody asked for the end."""
        if event is None:
            self._failure = self._killed()
            raise self._failure
        self._timeline.add(event)
        if event.kind == control.GUEST and event.code == layout.EVENT_AGENT:
            self._agent_ready = True
        elif event.kind == control.CONSOLE:
            self._console += event.content
        elif event.kind == control.STATS:  # the whole console follows
            self._stats = event.numbers
            self._console.clear()
        elif event.kind == control.REGS:
            self._registers = event.numbers
        elif event.kind == control.EXIT:
            self._exit = event
            if event.code != control.STOPPED:
                self._failure = self._ended(event)
                raise self._failure

    def _killed(self) -> MicrovmError:
        vmm = self._need_vmm()
        vmm.wait(_LAST_WORDS)
        status = vmm.wait_status or 0
        signo = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        how = f"was killed by signal {signo}" if signo else "ended without a word"
        hint = " (out of memory?)" if signo == 9 else ""
        return VmmKilledError(
            f"the VMM process {vmm.pid} {how}{hint}; the guest is gone",
            signal=signo,
            console=self._last_console(),
            report=self.report(),
        )

    def _ended(self, event: control.Event) -> MicrovmError:
        """What an exit means to somebody who still wanted something of the guest."""
        text = event.content.decode(errors="replace")
        when = "" if self._agent_ready else " before it was up"
        about: dict[str, Any] = {"console": self._last_console(), "report": self.report()}
        if event.code == control.POWEROFF:
            if event.value and (line := self._init_line()):
                return GuestGoneError(f"the guest's init gave up: {line}", **about)
            message = f"the guest powered off{when}"
            status = event.value if self._agent_ready else None
            return GuestGoneError(message, status=status, **about)
        if event.code == control.REBOOT:
            status = 0 if self._agent_ready else None
            return GuestGoneError(f"the guest restarted{when}", status=status, **about)
        if event.code == control.DEBUG_EXIT:
            message = f"the guest ended itself with debug-exit status {event.value}"
            return GuestGoneError(message, status=event.value, **about)
        if event.code == control.PANIC:
            return PanicError(f"the guest's kernel panicked{self._panic_line()}", **about)
        if event.code == control.SHUTDOWN:
            rip = self._registers.get("rip", 0)
            return TripleFaultError(f"the guest's CPU triple-faulted at {rip:#x}{when}", **about)
        if event.code == control.HALTED:
            return GuestGoneError(f"the guest's CPU halted for good{when}", **about)
        if event.code == control.SETUP:
            what = control.message_name(event.message)
            return HostError(f"{what}: {text.rpartition(': ')[2]}{self._setup_hint(event)}")
        return HostError(f"{text}; another backend: --accel dbt, or see microvm doctor", **about)

    def _setup_hint(self, event: control.Event) -> str:
        if event.message in (control.RAM, control.FILE) and event.value == -12:  # ENOMEM
            return f"; {self.config.memory >> 20} MiB are too much for this host: try less"
        return ""

    def _panic_line(self) -> str:
        line = self._line_after("Kernel panic - not syncing: ")
        return f": {line}" if line else ""

    def _init_line(self) -> str:
        """Why our init powered off: it says so as the last thing, after its name."""
        return self._line_after("\nmicrovm: ")

    def _line_after(self, mark: str) -> str:
        """What follows the last ``mark`` of the console in its line, fit for a message."""
        _, found, rest = self._last_console().replace("\r", "").rpartition(mark)
        line = rest.partition("\n")[0] if found else ""
        return "".join(c for c in line if c.isprintable())[:120]

    # ---- what is known -------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The VMM's process id while the guest runs."""
        return self._vmm.pid if self._vmm else None

    @property
    def console(self) -> str:
        """The last of what the guest wrote to its console, at most 256 KiB."""
        if self._vmm is not None and self._exit is None and self._failure is None:
            self._query()
        return self._last_console()

    def _last_console(self) -> str:
        """The console as the VMM last told it."""
        return self._console.decode(errors="replace")

    @property
    def timeline(self) -> dict[str, int]:
        """When what happened, in ns from the epoch; see :mod:`microvm.report`."""
        return self._timeline.points()

    def _query(self) -> None:
        vmm = self._need_vmm()
        vmm.send(control.query())
        try:
            while vmm.poll(_LAST_WORDS):
                event = vmm.receive()
                if event is not None and event.kind == control.QUERY_END:
                    return
                self._take(event)
        except MicrovmError:
            return  # kept in self._failure

    def report(self) -> dict[str, object]:
        """Everything that is known about the machine, ready for JSON; see :mod:`microvm.report`."""
        plan, end = self._plan, self._exit
        return {
            "accel": {"name": plan.accel, "why": plan.why} if plan else None,
            "kernel": {"path": plan.kernel.path, "version": plan.kernel.version} if plan else None,
            "initrds": list(plan.initrds) if plan else None,
            "cmdline": plan.image.cmdline if plan else None,
            "cpus": self.config.cpus,
            "sizes": {"memory": self.config.memory, **(plan.sizes() if plan else {})},
            "timeline": self.timeline,
            "end": {"reason": REASONS.get(end.code, str(end.code)), "value": end.value}
            if end
            else None,
            "exits": exits(self._stats),
            "counters": counters(self._stats),
            "registers": {name: f"{value:#x}" for name, value in self._registers.items()},
        }


#: The user's own login shell, as the guest's /etc/passwd names it.
LOGIN_SHELL = ("sh", "-c", 'exec "${SHELL:-/bin/sh}" -l')


def run(
    argv: Sequence[str | bytes],
    *,
    input: bytes | None = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    env: Mapping[str, str] | None = None,
    cwd: str = "",
    user: str = "",
    **options: Any,
) -> Completed:
    """Runs one command in a fresh guest: :meth:`Machine.run` in a machine with ``options``."""
    with Machine(**options) as machine:
        return machine.run(
            argv,
            input=input,
            capture_output=capture_output,
            timeout=timeout,
            check=check,
            env=env,
            cwd=cwd,
            user=user,
        )
