"""Running one program in the guest: the host's side of the session protocol.

The wire format and its rules stand in ``rootfs/proto.h``. There are two layers here:

- :class:`SessionProtocol`, bytes in and events out, owns no descriptor and never blocks: any
  event loop can drive it.
- :class:`Session`, a thin synchronous driver of it over one connected stream socket.

Data never passes through this module. Whoever can connect streams to the guest is handed in as
``open_stream(port, prefix, in_fd, out_fd)``: it connects to the agent's port, says ``prefix``
first, and bridges the caller's own descriptors to the stream (-1: that direction is not used).
:func:`open_session` makes those calls in the right order.

The guest is hostile: a frame that is too long, unknown, out of order or not of its exact size
raises :class:`GuestError`, and no text of the guest's is ever taken over into a message.
"""

from __future__ import annotations

import os
import struct
from select import POLLIN, poll
from time import monotonic

from microvm._record import Record
from microvm.errors import GuestError, TimeoutError
from microvm.layout import VSOCK_AGENT_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Protocol

    OpenStream = Callable[[int, bytes, int, int], None]

    class StreamSocket(Protocol):
        """What a :class:`Session` needs of its control stream: ``socket.socket`` has it."""

        def fileno(self) -> int: ...
        def send(self, data: bytes, /) -> int: ...
        def sendall(self, data: bytes, /) -> None: ...
        def recv(self, size: int, /) -> bytes: ...
        def close(self) -> None: ...


HELLO_MAGIC = 0x3153564D
FRAME_SEND_MAX = 1 << 20
FRAME_RECV_MAX = 64

STREAM_CONTROL = 1
STREAM_DATA = 2

CH_STDIN = 1
CH_STDOUT = 2
CH_STDERR = 4

F_EXEC = 1
F_SIGNAL = 2
F_WINSIZE = 3
F_HANGUP = 4
F_SHUTDOWN = 5
F_STARTED = 129
F_ERROR = 130
F_EXIT = 131

EXEC_PTY = 1
EXEC_LOGIN = 2

SHUTDOWN_POWEROFF = 1
SHUTDOWN_REBOOT = 2

STAGE_PROTOCOL = 1
STAGE_RESOURCES = 2
STAGE_USER = 3
STAGE_DIRECTORY = 4
STAGE_EXEC = 5

_HELLO = struct.Struct("<IIII")
_FRAME = struct.Struct("<II")
_EXEC = struct.Struct("<IIIIQHHHH")
_WINSIZE = struct.Struct("<HHHH")
_U32 = struct.Struct("<I")
_PAIR = struct.Struct("<II")

_ENOENT, _EACCES = 2, 13
_SIGNAL_MAX = 64


class WindowSize(Record):
    """Size of a terminal in characters and, if known, in pixels (else 0)."""

    rows: int = 24
    cols: int = 80
    xpixel: int = 0
    ypixel: int = 0

    def pack(self) -> bytes:
        """The size as it goes over the wire; values outside 0..65535 are clamped."""
        sizes = (self.rows, self.cols, self.xpixel, self.ypixel)
        return _WINSIZE.pack(*(min(max(size, 0), 0xFFFF) for size in sizes))


class Program(Record):
    """What to run in the guest.

    ``argv``: at least the program, looked up in the guest's ``PATH``; empty: the user's shell, as
    a login shell. ``env``: added to the
    defaults of the user (``HOME USER LOGNAME SHELL PATH``); nothing of the host's environment
    is added here. ``cwd``: "" is the user's home. ``user``: "" is root, else ``NAME`` or
    ``UID``, each optionally with ``:GROUP`` or ``:GID``. ``window``: a size asks for a
    terminal, None for pipes. ``realtime``: the host's clock in ns since 1970, by which the
    guest corrects its own if that is off by more than a second; 0 leaves it alone.
    """

    argv: Sequence[str | bytes]
    env: Mapping[str, str] = {}
    cwd: str = ""
    user: str = ""
    window: WindowSize | None = None
    realtime: int = 0


class Started(Record):
    """The program runs, as process ``pid`` of the guest."""

    pid: int


class Failed(Record):
    """The program could not be started; the session is over.

    ``stage`` is one of the ``STAGE_`` values, ``error`` Linux's errno.
    """

    stage: int
    error: int

    @property
    def returncode(self) -> int:
        """127: not found, 126: found but not executable, 125: anything else."""
        if self.stage != STAGE_EXEC:
            return 125
        return 127 if self.error == _ENOENT else 126

    def describe(self, program: Program) -> str:
        """One line for a person: what failed, on what."""
        name = os.fsdecode(program.argv[0]) if program.argv else "login shell"
        reason = os.strerror(self.error)
        if self.stage == STAGE_EXEC:
            if self.error == _ENOENT:
                return f"{name}: not found in the guest"
            return f"{name}: cannot be executed in the guest: {reason}"
        if self.stage == STAGE_USER:
            return f"user {program.user!r}: not known in the guest"
        if self.stage == STAGE_DIRECTORY:
            return f"directory {program.cwd!r}: cannot be entered in the guest: {reason}"
        if self.stage == STAGE_RESOURCES:
            return f"{name}: the guest lacks the resources to run it: {reason}"
        return f"{name}: the guest's agent refused the request: {reason}"


class Exited(Record):
    """The program has ended; the session is over. One of ``code`` and ``signo`` is 0."""

    code: int
    signo: int

    @property
    def returncode(self) -> int:
        """As a shell tells it: the exit status, or 128 + the signal's number."""
        return 128 + self.signo if self.signo else self.code


if TYPE_CHECKING:
    Event = Started | Failed | Exited
    Outcome = Failed | Exited


def data_prefix(session: int, channels: int) -> bytes:
    """What a data stream must say first: it carries ``channels`` of session ``session``."""
    return _HELLO.pack(HELLO_MAGIC, session, STREAM_DATA, channels)


def control_prefix(session: int) -> bytes:
    """What a control stream must say first."""
    return _HELLO.pack(HELLO_MAGIC, session, STREAM_CONTROL, 0)


def frame(kind: int, payload: bytes = b"") -> bytes:
    """One frame from the host to the agent."""
    if len(payload) > FRAME_SEND_MAX:
        raise ValueError(f"arguments and environment exceed {FRAME_SEND_MAX} bytes")
    return _FRAME.pack(kind, len(payload)) + payload


def exec_frame(program: Program, channels: int) -> bytes:
    """The EXEC frame: run ``program``, with ``channels`` connected by data streams.

    Raises ValueError for what cannot be said: NUL bytes, more than 1 MiB.
    """
    env = [os.fsencode(f"{key}={value}") for key, value in program.env.items()]
    argv = [os.fsencode(argument) for argument in program.argv]
    strings = [os.fsencode(program.cwd), os.fsencode(program.user), *argv, *env]
    for string in strings:
        if b"\0" in string:
            raise ValueError(f"{os.fsdecode(string)!r} has a NUL byte")
    window = program.window or WindowSize(rows=0, cols=0)
    flags = (EXEC_PTY if program.window else 0) | (0 if argv else EXEC_LOGIN)
    head = _EXEC.pack(
        flags,
        channels,
        len(argv),
        len(env),
        program.realtime,
        *_WINSIZE.unpack(window.pack()),
    )
    return frame(F_EXEC, head + b"\0".join(strings) + b"\0")


def signal_frame(signo: int) -> bytes:
    """Sends signal ``signo`` to the program's process group."""
    if not 0 < signo <= _SIGNAL_MAX:
        raise ValueError(f"{signo} is not a signal")
    return frame(F_SIGNAL, _U32.pack(signo))


def winsize_frame(window: WindowSize) -> bytes:
    """Tells the program's terminal its new size."""
    return frame(F_WINSIZE, window.pack())


def hangup_frame() -> bytes:
    """Hangs up: SIGHUP to the program, and SIGKILL after a moment."""
    return frame(F_HANGUP)


def shutdown_frame(*, reboot: bool = False, status: int = 0) -> bytes:
    """Ends the guest in good order; ``status`` (0..255) is what the VMM will report."""
    action = SHUTDOWN_REBOOT if reboot else SHUTDOWN_POWEROFF
    return frame(F_SHUTDOWN, _PAIR.pack(action, status & 0xFF))


class SessionProtocol:
    """What the agent says on one control stream, checked: bytes in, events out."""

    __slots__ = ("_buffer", "outcome", "pid")

    def __init__(self) -> None:
        self._buffer = b""
        self.pid = 0
        self.outcome: Outcome | None = None

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes as they came; returns what they complete.

        ``b""`` is the end of the stream. Raises GuestError for anything that the protocol does
        not allow, an end before the outcome included.
        """
        if not data:
            if self.outcome is None:
                raise GuestError("the guest's agent hung up before the program ended")
            return []
        self._buffer += data
        events = []
        while (event := self._next_event()) is not None:
            events.append(event)
        return events

    def _next_event(self) -> Event | None:
        if len(self._buffer) < _FRAME.size:
            return None
        kind, size = _FRAME.unpack_from(self._buffer)
        if size > FRAME_RECV_MAX:
            raise GuestError(f"the guest's agent sent a frame of {size} bytes")
        end = _FRAME.size + size
        if len(self._buffer) < end:
            return None
        payload, self._buffer = self._buffer[_FRAME.size : end], self._buffer[end:]
        return self._decode(kind, payload)

    def _decode(self, kind: int, payload: bytes) -> Event:
        if self.outcome is not None:
            raise GuestError("the guest's agent went on talking after the end of its session")
        if kind == F_STARTED and len(payload) == _U32.size and not self.pid:
            (pid,) = _U32.unpack(payload)
            if pid:
                self.pid = pid
                return Started(pid=pid)
        elif kind == F_ERROR and len(payload) == _PAIR.size and not self.pid:
            stage, error = _PAIR.unpack(payload)
            if STAGE_PROTOCOL <= stage <= STAGE_EXEC and 0 < error < 4096:
                self.outcome = Failed(stage=stage, error=error)
                return self.outcome
        elif kind == F_EXIT and len(payload) == _PAIR.size and self.pid:
            code, signo = _PAIR.unpack(payload)
            if code <= 255 and signo <= _SIGNAL_MAX and not (code and signo):
                self.outcome = Exited(code=code, signo=signo)
                return self.outcome
        raise GuestError(f"the guest's agent sent a frame that makes no sense (type {kind})")


class Session:
    """One program in the guest, driven synchronously over its control stream.

    Owns ``sock``, a connected stream socket whose other end is bridged to the agent with
    :func:`control_prefix` said already. Not thread-safe.
    """

    __slots__ = ("_protocol", "_sock")

    def __init__(self, sock: StreamSocket) -> None:
        self._sock = sock
        self._protocol = SessionProtocol()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The program's process number in the guest; 0 before it has started."""
        return self._protocol.pid

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, or None if it has not yet."""
        return self._protocol.outcome

    def fileno(self) -> int:
        """Readable: call :meth:`receive`."""
        return self._sock.fileno()

    def start(self, program: Program, channels: int) -> None:
        """Asks for ``program``; it starts as soon as data streams for ``channels`` are there."""
        self._sock.sendall(exec_frame(program, channels))

    def receive(self) -> list[Event]:
        """Reads once from the stream; returns the events that this completes."""
        return self._protocol.receive(self._recv())

    def _recv(self) -> bytes:
        try:
            return self._sock.recv(4096)
        except ConnectionError:
            return b""

    def wait(self, timeout: float | None = None) -> Outcome:
        """Waits until the session is over, at most ``timeout`` seconds.

        The last bytes of the data streams may still be on their way through ``open_stream``'s
        bridge. Raises TimeoutError, and GuestError if the agent hangs up or breaks the protocol.
        """
        deadline = None if timeout is None else monotonic() + timeout
        poller = poll()
        poller.register(self._sock.fileno(), POLLIN)
        while self._protocol.outcome is None:
            left = None if deadline is None else max(0.0, deadline - monotonic())
            if not poller.poll(None if left is None else left * 1000):
                raise TimeoutError(f"the program was still running after {timeout} s")
            self.receive()
        return self._protocol.outcome

    def signal(self, signo: int) -> None:
        """Sends a signal to the program's process group; nothing once it has ended."""
        self._send(signal_frame(signo))

    def resize(self, window: WindowSize) -> None:
        """Gives the program's terminal a new size."""
        self._send(winsize_frame(window))

    def hangup(self) -> None:
        """Hangs up; the outcome still comes."""
        self._send(hangup_frame())

    def shutdown(self, *, reboot: bool = False, status: int = 0) -> None:
        """Ends the whole guest in good order."""
        self._send(shutdown_frame(reboot=reboot, status=status))

    def _send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except ConnectionError:
            return  # the session is over; its outcome says so

    def close(self) -> None:
        """Closes the control stream: a program that still runs is hung up."""
        self._sock.close()


def open_session(
    open_stream: OpenStream,
    control: tuple[StreamSocket, int],
    session: int,
    program: Program,
    stdio: tuple[int, int, int],
) -> Session:
    """Starts ``program`` as session ``session`` with the caller's descriptors as its stdio.

    ``control``: a connected pair, our end as a socket and the other end's descriptor, which
    ``open_stream`` takes over. ``session``: any number that no other running session has.
    ``stdio``: descriptors for stdin, stdout and stderr, -1 for /dev/null; with a terminal
    (``program.window``) stderr is not used.
    """
    sock, far = control
    in_fd, out_fd, err_fd = stdio
    if program.window is not None:
        err_fd = -1
    channels = (in_fd >= 0) * CH_STDIN | (out_fd >= 0) * CH_STDOUT | (err_fd >= 0) * CH_STDERR
    result = Session(sock)
    open_stream(VSOCK_AGENT_PORT, control_prefix(session), far, far)
    result.start(program, channels)
    if in_fd >= 0 or out_fd >= 0:
        both = channels & (CH_STDIN | CH_STDOUT)
        open_stream(VSOCK_AGENT_PORT, data_prefix(session, both), in_fd, out_fd)
    if err_fd >= 0:
        open_stream(VSOCK_AGENT_PORT, data_prefix(session, CH_STDERR), -1, err_fd)
    return result
