"""A command that runs in the guest, seen from the host.

The command's standard streams are descriptors that the VMM bridges to the guest by itself; what
passes through here is only what the caller wants in memory (``input``, captured output), the
command's fate, and signals. :meth:`Command.wait` is one poll over all of that and the VMM's
control socket, so that a guest that dies is told from a command that ends.
"""

from __future__ import annotations

import os
from select import POLLIN, POLLOUT, poll
from time import monotonic

from microvm._record import Record
from microvm.errors import CommandError, GuestError, MicrovmError, TimeoutError
from microvm.session import Failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from microvm.session import Program, Session, WindowSize

    class Guest(Protocol):
        """What a command needs of its machine."""

        def fileno(self) -> int: ...
        def dispatch(self) -> None:
            """Takes in what the VMM said; raises if the guest is over."""

        def explain(self) -> None:
            """Waits a moment for the VMM's last words; raises if the guest is over."""


CAPTURE_MAX = 256 << 20
_CHUNK = 65536


class Completed(Record):
    """A command that has ended.

    ``returncode``: its exit status, 128 + n if signal n ended it. ``stdout``, ``stderr``: what it
    wrote, None where that was not captured. ``escaped``: Ctrl-] ended it.
    """

    args: tuple[str | bytes, ...]
    returncode: int
    stdout: bytes | None = None
    stderr: bytes | None = None
    escaped: bool = False

    def check(self) -> Completed:
        """Itself; raises ``CommandError`` if the status is not 0."""
        if self.returncode:
            raise CommandError(
                f"{os.fsdecode(self.args[0])!r} ended with status {self.returncode}",
                returncode=self.returncode,
                stdout=self.stdout,
                stderr=self.stderr,
            )
        return self


class Sink:
    """Collects what comes out of a pipe, up to ``CAPTURE_MAX`` bytes."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        self._parts: list[bytes] = []
        self._size = 0

    def fileno(self) -> int:
        return self._reader

    def take(self) -> bool:
        """Reads once; False at end of file. Raises ``GuestError`` when it becomes too much."""
        part = os.read(self._reader, _CHUNK)
        self._parts.append(part)
        self._size += len(part)
        if self._size > CAPTURE_MAX:
            raise GuestError(
                f"the command wrote more than {CAPTURE_MAX >> 20} MiB to be captured: "
                "give it a file instead"
            )
        return bool(part)

    def content(self) -> bytes:
        return b"".join(self._parts)

    def close(self) -> None:
        self.close_writer()
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1

    def close_writer(self) -> None:
        """The VMM has its own copy now."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1


class Source:
    """Feeds bytes into a pipe as fast as they are taken."""

    def __init__(self, content: bytes) -> None:
        self.reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._rest = memoryview(content)

    def fileno(self) -> int:
        return self._writer

    def feed(self) -> bool:
        """Writes once; False when there is nothing left to do."""
        try:
            if self._rest:
                self._rest = self._rest[os.write(self._writer, self._rest[:_CHUNK]) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        return bool(self._rest)

    def close_reader(self) -> None:
        """The VMM has its own copy now."""
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1

    def close(self) -> None:
        self.close_reader()
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1


class Command:
    """A running command. Made by :meth:`microvm.Machine.spawn`; close it, or use ``with``."""

    def __init__(
        self,
        guest: Guest,
        session: Session,
        program: Program,
        *,
        done: int,
        source: Source | None = None,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
    ) -> None:
        self._guest = guest
        self._session = session
        self._program = program
        self._done = done
        self._stdout = stdout
        self._stderr = stderr
        self._source = source
        self._handlers: dict[int, Callable[[], None]] = {}
        self._poller = poll()
        self._guest_failure: MicrovmError | None = None
        self._watch(guest.fileno(), POLLIN, self._on_guest)
        self._watch(session.fileno(), POLLIN, self._on_session)
        self._watch(done, POLLIN, self._on_done)
        for sink in (stdout, stderr):
            if sink:
                self._watch_sink(sink)
        if source:
            self._watch(source.fileno(), POLLOUT, self._on_source)

    # ---- what a caller may do ------------------------------------------------------------

    def signal(self, signo: int) -> None:
        """Sends a signal to the command's process group in the guest."""
        self._session.signal(signo)

    def resize(self, window: WindowSize) -> None:
        """Tells the command's terminal its new size."""
        self._session.resize(window)

    def hangup(self) -> None:
        """SIGHUP for the command, and after a moment SIGKILL."""
        self._session.hangup()

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Calls ``handler`` during :meth:`wait` whenever ``fd`` can be read."""
        self._watch(fd, POLLIN, handler)

    def unwatch(self, fd: int) -> None:
        """Ends :meth:`watch`."""
        if self._handlers.pop(fd, None):
            self._poller.unregister(fd)

    def wait(self, timeout: float | None = None) -> Completed:
        """Waits until the command has ended and all its output has been written.

        ``timeout``: seconds from now. Raises ``TimeoutError`` when they are over (the command goes
        on), ``CommandError`` with status 125 to 127 if it cannot be started, and what became of
        the guest if that ends first; what the command wrote before that is still waited for.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while not self._is_over() or self._pending():
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                name = os.fsdecode(self._program.argv[0])
                raise TimeoutError(f"{name!r} was still running after {timeout:g} s")
            ready = self._poller.poll(None if left is None else left * 1000 + 1)
            for fd, _ in ready:
                if handler := self._handlers.get(fd):
                    handler()
        outcome = self._session.outcome
        if outcome is None:
            assert self._guest_failure
            raise self._guest_failure
        if isinstance(outcome, Failed):
            raise CommandError(outcome.describe(self._program), returncode=outcome.returncode)
        return Completed(
            args=tuple(self._program.argv),
            returncode=outcome.returncode,
            stdout=self._stdout.content() if self._stdout else None,
            stderr=self._stderr.content() if self._stderr else None,
        )

    def close(self) -> None:
        """Ends the session, and with it a command that still runs."""
        self._session.close()
        for end in (self._source, self._stdout, self._stderr):
            if end:
                end.close()
        if self._done >= 0:
            os.close(self._done)
            self._done = -1

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # ---- events ----------------------------------------------------------------------------

    def _watch(self, fd: int, events: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._poller.register(fd, events)

    def _is_over(self) -> bool:
        return self._session.outcome is not None or self._guest_failure is not None

    def _pending(self) -> bool:
        """Whether output may still come."""
        waiting = (self._done, *(s.fileno() for s in (self._stdout, self._stderr) if s))
        return any(fd in self._handlers for fd in waiting)

    def _on_guest(self) -> None:
        try:
            self._guest.dispatch()
        except MicrovmError as error:
            self._fail(error)

    def _on_session(self) -> None:
        try:
            self._session.receive()
        except GuestError as error:
            try:
                self._guest.explain()
            except MicrovmError as better:
                self._fail(better)
            else:
                self._fail(error)
        if self._session.outcome is not None:
            self.unwatch(self._session.fileno())

    def _fail(self, error: MicrovmError) -> None:
        """The guest is over, or its agent gone mad: only output that is under way is left."""
        self._guest_failure = error
        self.unwatch(self._guest.fileno())
        self.unwatch(self._session.fileno())

    def _on_done(self) -> None:
        if not os.read(self._done, 1):
            self.unwatch(self._done)

    def _watch_sink(self, sink: Sink) -> None:
        def take() -> None:
            if not sink.take():
                self.unwatch(sink.fileno())

        self._watch(sink.fileno(), POLLIN, take)

    def _on_source(self) -> None:
        assert self._source
        if not self._source.feed():
            self.unwatch(self._source.fileno())
            self._source.close()
