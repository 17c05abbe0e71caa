"""The VMM process: started, talked to, ended.

``mv-vmm`` is a native executable, one process a guest. It is born with one end of a socket pair
and does what the messages say (:mod:`microvm.control`). It ends when that socket closes, so
nobody who dies without cleaning up leaves a guest behind; when *it* dies, reading the socket
gives end of file.

``os.posix_spawn`` and ``_socket`` because ``subprocess`` and ``socket`` take longer to import than
the VMM takes to start.
"""

from __future__ import annotations

import os
import sys
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_SEQPACKET, SOL_SOCKET, socketpair
from select import POLLIN, poll

from microvm import control
from microvm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_EXECUTABLE = "mv-vmm"
_PATIENCE = 5.0  # seconds; the VMM gives itself three to write what it keeps


def executable() -> str:
    """The path of ``mv-vmm``: ``$MICROVM_VMM``, the package's own, or the source tree's build.

    Raises ``ConfigError`` if there is none.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    chosen = os.environ.get("MICROVM_VMM")
    places = [chosen] if chosen else []
    places.append(os.path.join(here, "bin", _EXECUTABLE))
    places.append(os.path.join(os.path.dirname(here), "build", "native", _EXECUTABLE))
    for place in places:
        if os.access(place, os.X_OK):
            return place
    raise ConfigError(f"{places[-1]} is missing: run `make build`")


class Vmm:
    """One VMM process and the control socket to it. Close it, or use it in a ``with``."""

    def __init__(self) -> None:
        """Starts the process. Raises ``HostError`` if this machine cannot."""
        path = executable()
        self._socket, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        #: Exit status as ``os.waitpid`` gives it, once the process has been waited for.
        self.wait_status: int | None = None
        try:
            self.pid = os.posix_spawn(
                path,
                [_EXECUTABLE],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), control.FD),
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
                    (os.POSIX_SPAWN_DUP2, 0, 1),
                ],
                setsid=True,
            )
        except OSError as error:
            self._socket.close()
            raise HostError(f"{path} does not start: {error.strerror}") from error
        finally:
            theirs.close()
        self._readable = poll()
        self._readable.register(self._socket.fileno(), POLLIN)

    def fileno(self) -> int:
        """The control socket, readable when :meth:`receive` has something."""
        return self._socket.fileno()

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """Sends one message with descriptors, which stay the caller's.

        A VMM that is gone is no error here: its last words, or end of file, wait in
        :meth:`receive`.
        """
        try:
            if fds:
                rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
                self._socket.sendmsg([packet], [(SOL_SOCKET, SCM_RIGHTS, rights)])
            else:
                self._socket.send(packet)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def connect(
        self,
        port: int,
        prefix: bytes = b"",
        *,
        source: int | None = None,
        sink: int | None = None,
        both: int | None = None,
        done: int | None = None,
    ) -> None:
        """Opens a vsock stream to ``port`` of the guest that begins with ``prefix``.

        Bytes read from descriptor ``source`` go to the guest, end of file too; the guest's bytes
        go to ``sink``; or ``both`` is a socket for both ways. The VMM has its own copies; its copy
        of ``done`` is closed when the stream is over and everything has been written to ``sink``.
        A stream that cannot be opened ends in the same way.
        """
        have = [
            (bit, fd)
            for bit, fd in (
                (control.FD_IN, source),
                (control.FD_OUT, sink),
                (control.FD_BOTH, both),
                (control.FD_DONE, done),
            )
            if fd is not None
        ]
        self.send(
            control.connect(port, sum(bit for bit, _ in have), prefix), [fd for _, fd in have]
        )

    def receive(self, timeout: float | None = None) -> control.Event | None:
        """The next event; None when the VMM is gone.

        ``timeout`` is in seconds. Raises the built-in ``TimeoutError`` when it passes.
        """
        if timeout is not None and not self.poll(timeout):
            raise TimeoutError
        try:
            packet = self._socket.recv(control.PACKET_MAX)
        except ConnectionResetError:
            # It ended with messages of ours unread. Linux says that first, once; what it had to
            # say is still there.
            packet = self._socket.recv(control.PACKET_MAX)
        return control.decode(packet) if packet else None

    def poll(self, timeout: float) -> bool:
        """Whether something can be received within ``timeout`` seconds."""
        return bool(self._readable.poll(max(0, int(timeout * 1000 + 0.999))))

    def kill(self) -> None:
        """Ends the process at once."""
        if self.wait_status is None:
            os.kill(self.pid, 9)

    def wait(self, timeout: float) -> bool:
        """Waits until the process has ended, ``timeout`` seconds at most; whether it has."""
        if self.wait_status is not None:
            return True
        try:
            handle = os.pidfd_open(self.pid)
            try:
                ended = poll()
                ended.register(handle, POLLIN)
                if not ended.poll(int(timeout * 1000)):
                    return False
            finally:
                os.close(handle)
            self.wait_status = os.waitpid(self.pid, 0)[1]
        except (ChildProcessError, ProcessLookupError):  # somebody else here waited for it
            self.wait_status = 0
        return True

    def close(self) -> None:
        """Closes the socket, which ends the process, and waits for it."""
        self._socket.close()
        if not self.wait(_PATIENCE):
            self.kill()
            self.wait(_PATIENCE)

    def __enter__(self) -> Vmm:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
