"""The guest's end of a vsock device, packet by packet (virtio 1.2 §5.10)."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar

from tests.rig import Buf, Rig

HOST, GUEST = 2, 3
RX, TX, EVENT = range(3)
STREAM = 1
RCV, SEND = 1, 2


class Op(IntEnum):
    """Operations, §5.10.6."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet as it is on the ring."""

    op: int
    src_port: int
    dst_port: int
    data: bytes = b""
    flags: int = 0
    buf_alloc: int = 1 << 18
    fwd_cnt: int = 0
    src_cid: int = GUEST
    dst_cid: int = HOST
    type: int = STREAM
    len: int | None = None

    FORMAT: ClassVar[str] = "<QQIIIHHIII"

    def header(self) -> bytes:
        """The 44 bytes before the payload."""
        return struct.pack(
            self.FORMAT,
            *(self.src_cid, self.dst_cid, self.src_port, self.dst_port),
            len(self.data) if self.len is None else self.len,
            *(self.type, self.op, self.flags, self.buf_alloc, self.fwd_cnt),
        )

    @classmethod
    def parse(cls, raw: bytes) -> Packet:
        """From a receive buffer."""
        f = struct.unpack(cls.FORMAT, raw[:44])
        assert len(raw) == 44 + f[4], "used.len is header and payload"
        return cls(
            *(f[6], f[2], f[3], raw[44:], f[7], f[8], f[9]),
            *(f[0], f[1], f[5], f[4]),
        )


class Guest:
    """A driver with receive buffers of `rx_size` bytes in its ring."""

    def __init__(
        self, rig: Rig, buffers: int = 32, rx_size: int = 4096, slot: int = 0, size: int = 64
    ) -> None:
        self.rig = rig
        self.vsock, self.driver = rig.vsock(slot)
        self.driver.start(queues=3, size=size)
        self.rx_size = rx_size
        self._where: dict[int, int] = {}
        self._queue: list[Packet] = []
        self._tx_free: list[int] = []
        self.give(buffers)

    def give(self, buffers: int) -> None:
        """Adds fresh receive buffers and notifies."""
        ring = self.driver.rings[RX]
        for _ in range(buffers):
            gpa = self.driver.alloc(self.rx_size)
            self._where[ring.add([Buf(gpa, self.rx_size, True)])] = gpa
        if buffers:
            self.driver.notify(RX)

    def poll(self, refill: bool = True) -> list[Packet]:
        """Packets that have come; their buffers go back into the ring."""
        ring = self.driver.rings[RX]
        packets, back = [], []
        for head, size in ring.take():
            gpa = self._where.pop(head)
            packets.append(Packet.parse(self.rig.load(gpa, size)))
            back.append(gpa)
        for gpa in back if refill else ():
            self._where[ring.add([Buf(gpa, self.rx_size, True)])] = gpa
        if back and refill:
            self.driver.notify(RX)
        return packets

    def expect(self, op: Op, **fields: int | bytes) -> Packet:
        """The next packet, stepping the loop until it is there."""
        if not self._queue:
            self.rig.until(lambda: self._queue.extend(self.poll()) or self._queue)
        packet = self._queue.pop(0)
        got = {name: getattr(packet, name) for name in fields}
        assert (Op(packet.op), got) == (op, fields)
        return packet

    def quiet(self, steps: int = 5) -> bool:
        """True if nothing comes."""
        self.rig.step(steps)
        self._queue.extend(self.poll())
        return not self._queue

    def send(self, packet: Packet, *, split: int = 0, readable: int | None = None) -> None:
        """Transmits. `split`: bytes in the first descriptor; `readable`: cut the buffers short."""
        raw = (packet.header() + packet.data)[:readable]
        ring = self.driver.rings[TX]
        if len(self._tx_free) < 1:
            self._tx_free.append(self.driver.alloc(70000))
        gpa = self._tx_free.pop()
        self.rig.store(gpa, raw)
        parts = [(0, split), (split, len(raw) - split)] if split else [(0, len(raw))]
        head = ring.add([Buf(gpa + at, size) for at, size in parts])
        self.driver.notify(TX)
        done: list[tuple[int, int]] = []
        self.rig.until(lambda: done.extend(ring.take()) or done)
        assert done == [(head, 0)]
        self._tx_free.append(gpa)

    # -- the host's side ------------------------------------------------------

    def connect_from_host(
        self, port: int, in_fd: int = -1, out_fd: int = -1, prefix: bytes = b"", tag: int = 0
    ) -> int:
        """mv_vsock_connect: its result."""
        result: int = self.rig.lib.rig_connect(
            self.rig.ptr, self.vsock, port, in_fd, out_fd, prefix, len(prefix), tag
        )
        return result

    def open_from_host(
        self, port: int = 1024, *, buf_alloc: int = 1 << 18, tag: int = 0, **ends: int | bytes
    ) -> Stream:
        """A stream that the host opened and the guest accepted."""
        assert self.connect_from_host(port, tag=tag, **ends) > 0  # type: ignore[arg-type]
        request = self.expect(Op.REQUEST, dst_port=port)
        stream = Stream(self, port, request.src_port, tag, buf_alloc, request.buf_alloc)
        stream.send(Op.RESPONSE)
        return stream

    def open_from_guest(
        self, port: int, guest_port: int = 5000, *, in_fd: int = -1, out_fd: int = -1, tag: int = 0
    ) -> Stream:
        """A stream that the guest opened to a listening port of the host."""
        self.rig.lib.rig_offer(self.rig.ptr, in_fd, out_fd, tag)
        self.send(Packet(Op.REQUEST, guest_port, port))
        answer = self.expect(Op.RESPONSE, src_port=port, dst_port=guest_port)
        return Stream(self, guest_port, port, tag, 1 << 18, answer.buf_alloc)

    def closed(self, tag: int) -> int | None:
        """The error that on_close was given for a tag; None: not yet called."""
        error = ctypes.c_int()
        times = self.rig.lib.rig_closed(self.rig.ptr, tag, ctypes.byref(error))
        assert times <= 1, "on_close is called once"
        return error.value if times else None

    def listen(self, port: int) -> int:
        """mv_vsock_listen: its result."""
        result: int = self.rig.lib.rig_listen(self.rig.ptr, self.vsock, port)
        return result


class Stream:
    """One connection as the guest knows it."""

    def __init__(
        self, guest: Guest, port: int, host_port: int, tag: int, buf_alloc: int, peer_alloc: int
    ) -> None:
        self.guest = guest
        self.header = Packet(Op.RW, port, host_port, buf_alloc=buf_alloc)
        self.tag = tag
        self.peer_alloc = peer_alloc
        self.got = 0

    def send(self, op: Op, data: bytes = b"", **fields: int | None) -> None:
        """One packet of this stream."""
        packet = replace(self.header, op=op, data=data, fwd_cnt=self.got & 0xFFFFFFFF)
        self.guest.send(replace(packet, **fields))  # type: ignore[arg-type]

    def expect(self, op: Op, **fields: int | bytes) -> Packet:
        """The next packet is of this stream."""
        packet = self.guest.expect(
            op, src_port=self.header.dst_port, dst_port=self.header.src_port, **fields
        )
        self.got += len(packet.data)
        return packet

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes from the host, giving credit as it goes."""
        data = b""
        while len(data) < size:
            data += self.expect(Op.RW).data
            self.send(Op.CREDIT_UPDATE)
        assert len(data) == size
        return data

    def closed(self) -> int | None:
        """The error that on_close was given on the host's side; None: not yet called."""
        return self.guest.closed(self.tag)

    def wait_closed(self) -> int:
        """Waits for on_close; its error."""
        self.guest.rig.until(lambda: self.closed() is not None)
        error = self.closed()
        assert error is not None
        return error
