"""A stand-in for mv-vmm: the control protocol with the guest's agent run on the host.

    python mock_vmm.py INIT MODE

It lets the front (machine, sessions, command line) be tested in milliseconds and on any machine.
MODE says how the "guest" behaves: "well"; "hang", "panic", "poweroff" or "die" before the agent
answers; "vanish": dies half a second after the first connection.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from microvm import control, layout

CHUNK = 65536
PANIC = b"Linux version 0\n\x1b[31mKernel panic - not syncing: No working init found.\n"


def packet(kind: int, body: bytes = b"") -> bytes:
    return control.HEADER_FORMAT.pack(kind, control.HEADER_FORMAT.size + len(body)) + body


def stats() -> bytes:
    return packet(control.STATS, bytes(control.STATS_FORMAT.size))


def end(reason: int, value: int = 0, console: bytes = b"") -> list[bytes]:
    """What the VMM says last."""
    body = control.EXIT_FORMAT.pack(time.monotonic_ns(), reason, value, 0, 0)
    said = [packet(control.CONSOLE, console)] if console else []
    return [stats(), *said, packet(control.EXIT, body)]


class Bridge:
    """One stream: descriptors of the front on one side, a socket of the agent on the other."""

    def __init__(self, path: str, fds: list[int], which: int, prefix: bytes) -> None:
        self.stream = socket.socket(socket.AF_UNIX)
        self.stream.connect(path)
        self.stream.sendall(prefix)
        take = iter(fds)
        self.source = next(take) if which & (control.FD_IN | control.FD_BOTH) else -1
        self.sink = next(take) if which & control.FD_OUT else -1
        if which & control.FD_BOTH:
            self.sink = os.dup(self.source)
        self.done = next(take) if which & control.FD_DONE else -1
        threading.Thread(target=self.to_host, daemon=True).start()
        if self.source >= 0:
            threading.Thread(target=self.to_guest, daemon=True).start()

    def to_guest(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self.source, CHUNK):
                self.stream.sendall(data)
            self.stream.shutdown(socket.SHUT_WR)

    def to_host(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.stream.recv(CHUNK):
                while data and self.sink >= 0:
                    data = data[os.write(self.sink, data) :]
        self.stream.close()
        for fd in (self.sink, self.done):
            if fd >= 0:
                os.close(fd)


class Vmm:
    def __init__(self, init: str, mode: str) -> None:
        self.init, self.mode = init, mode
        self.front = socket.socket(fileno=control.FD)
        self.directory = tempfile.mkdtemp()
        self.path = f"{self.directory}/agent"
        self.agent: subprocess.Popen[bytes] | None = None

    def say(self, *packets: bytes) -> None:
        for each in packets:
            self.front.send(each)

    def guest_event(self, code: int) -> None:
        self.say(packet(control.GUEST, control.GUEST_FORMAT.pack(time.monotonic_ns(), code, 1)))

    def start(self) -> None:
        self.say(packet(control.STARTED, control.STARTED_FORMAT.pack(time.monotonic_ns())))
        if self.mode == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mode == "panic":
            self.say(*end(control.PANIC, console=PANIC))
        if self.mode == "poweroff":
            self.say(*end(control.POWEROFF, 3))
        if self.mode not in ("well", "vanish"):
            return
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(64)
        self.guest_event(layout.EVENT_INIT)
        self.agent = subprocess.Popen(
            [self.init, "agent", str(listener.fileno())], pass_fds=[listener.fileno()]
        )
        listener.close()
        self.guest_event(layout.EVENT_AGENT)

    def connect(self, body: bytes, fds: list[int]) -> None:
        _, which = control.CONNECT_FORMAT.unpack_from(body)
        Bridge(self.path, fds, which, body[control.CONNECT_FORMAT.size :])
        if self.mode == "vanish":
            threading.Timer(0.5, self.vanish).start()

    def vanish(self) -> None:
        assert self.agent
        self.agent.kill()
        os._exit(0)

    def serve(self) -> None:
        while True:
            readable, _, _ = select.select([self.front], [], [], 0.05)
            if self.agent and self.agent.poll() is not None:
                self.say(*end(control.POWEROFF, self.agent.returncode))
                return
            if not readable:
                continue
            data, fds, _, _ = socket.recv_fds(self.front, control.PACKET_MAX, control.FDS_MAX)
            if not data:
                return
            kind, _ = control.HEADER_FORMAT.unpack_from(data)
            if kind == control.START:
                self.start()
            elif kind == control.CONNECT:
                self.connect(data[control.HEADER_FORMAT.size :], fds)
                continue
            elif kind == control.QUERY:
                self.say(stats(), packet(control.CONSOLE, b"hello\n"), packet(control.QUERY_END))
            elif kind == control.STOP:
                self.say(*end(control.STOPPED))
                return
            for fd in fds:
                os.close(fd)


if __name__ == "__main__":
    vmm = Vmm(sys.argv[1], sys.argv[2])
    try:
        vmm.serve()
    finally:
        if vmm.agent:
            vmm.agent.kill()
            vmm.agent.wait()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(vmm.path)
        os.rmdir(vmm.directory)
