"""The vsock device against a driver in Python: streams, credit, ends of all kinds of descriptor.

python -m pytest tests/unit/test_virtio_vsock.py
"""

from __future__ import annotations

import contextlib
import os
import pty
import socket
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import Rig
from tests.rig.vsock import RCV, SEND, Guest, Op, Packet

BOTH = RCV | SEND
SERVICE = 700  # a port of the host that listens


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(64 << 20) as rig:
        yield rig


@pytest.fixture
def guest(rig: Rig) -> Guest:
    guest = Guest(rig)
    assert guest.listen(SERVICE) == 0
    return guest


def dup(fd: int) -> int:
    """A descriptor to give away."""
    return os.dup(fd)


def pipe() -> tuple[int, int]:
    """A pipe: (reader, writer)."""
    return os.pipe2(os.O_CLOEXEC)


def drain(fd: int) -> bytes:
    """What a pipe holds now."""
    os.set_blocking(fd, False)
    data = b""
    try:
        while part := os.read(fd, 1 << 20):
            data += part
    except BlockingIOError:
        pass
    return data


def test_connect_accepted_sends_prefix_before_input(guest: Guest) -> None:
    r, w = pipe()
    os.write(w, b"input")
    stream = guest.open_from_host(in_fd=r, prefix=b"prefix:")
    assert stream.read(12) == b"prefix:input"
    os.close(w)


def test_connect_before_driver_waits_for_it(rig: Rig) -> None:
    guest = Guest(rig)
    guest.driver.w(0x70, 0)
    assert guest.connect_from_host(1024) > 0
    guest.driver.start(queues=3)
    guest._where.clear()
    guest.give(4)
    guest.expect(Op.REQUEST, dst_port=1024, src_cid=2, dst_cid=3)


def test_connect_refused_reports_econnrefused(guest: Guest) -> None:
    guest.connect_from_host(9, tag=1)
    request = guest.expect(Op.REQUEST)
    guest.send(Packet(Op.RST, 9, request.src_port, buf_alloc=0))
    guest.rig.until(lambda: guest.closed(1) == -111)


def test_guest_data_reaches_pipe_at_once(guest: Guest) -> None:
    r, w = pipe()
    stream = guest.open_from_host(out_fd=w)
    stream.send(Op.RW, b"hello")
    assert os.read(r, 100) == b"hello"
    os.close(r)


def test_guest_data_split_header_reaches_pipe(guest: Guest) -> None:
    r, w = pipe()
    stream = guest.open_from_host(out_fd=w)
    packet = Packet(Op.RW, stream.header.src_port, stream.header.dst_port, b"split")
    guest.send(packet, split=10)
    guest.send(packet, split=46)
    assert os.read(r, 100) == b"splitsplit"
    os.close(r)


def test_eof_on_input_tells_guest_shutdown_send(guest: Guest) -> None:
    r, w = pipe()
    stream = guest.open_from_host(in_fd=r)
    os.write(w, b"last words")
    os.close(w)
    assert stream.read(10) == b"last words"
    stream.expect(Op.SHUTDOWN, flags=SEND)
    assert stream.closed() is None


def test_half_close_host_first_guest_still_sends(guest: Guest) -> None:
    r, w = pipe()
    in_fd = os.open("/dev/null", os.O_RDONLY)
    stream = guest.open_from_host(in_fd=in_fd, out_fd=w)
    stream.expect(Op.SHUTDOWN, flags=SEND)
    stream.send(Op.RW, b"answer")
    stream.send(Op.SHUTDOWN, flags=BOTH)
    stream.expect(Op.RST)
    assert stream.wait_closed() == 0
    assert os.read(r, 100) == b"answer"
    assert os.read(r, 100) == b""
    os.close(r)


def test_guest_shutdown_send_closes_output_only(guest: Guest) -> None:
    in_r, in_w = pipe()
    out_r, out_w = pipe()
    stream = guest.open_from_host(in_fd=in_r, out_fd=out_w)
    stream.send(Op.RW, b"x")
    stream.send(Op.SHUTDOWN, flags=SEND)
    guest.rig.step(2)
    assert os.read(out_r, 10) == b"x"
    assert os.read(out_r, 10) == b""
    os.write(in_w, b"still there")
    assert stream.read(11) == b"still there"
    assert stream.closed() is None
    os.close(in_w)
    os.close(out_r)


def test_guest_shutdown_receive_closes_input_only(guest: Guest) -> None:
    in_r, in_w = pipe()
    out_r, out_w = pipe()
    stream = guest.open_from_host(in_fd=in_r, out_fd=out_w)
    stream.send(Op.SHUTDOWN, flags=RCV)
    guest.rig.step(2)
    with pytest.raises(BrokenPipeError):
        os.write(in_w, b"nobody reads")
    stream.send(Op.RW, b"y")
    assert os.read(out_r, 10) == b"y"
    os.close(in_w)
    os.close(out_r)


def test_output_reader_gone_tells_guest_shutdown_receive(guest: Guest) -> None:
    r, w = pipe()
    stream = guest.open_from_host(out_fd=w)
    os.close(r)
    stream.expect(Op.SHUTDOWN, flags=RCV)
    stream.send(Op.RW, b"into the void")
    stream.send(Op.SHUTDOWN, flags=BOTH)
    stream.expect(Op.RST)
    assert stream.wait_closed() == -32


def test_output_full_disk_reports_enospc(guest: Guest) -> None:
    stream = guest.open_from_host(out_fd=os.open("/dev/full", os.O_WRONLY))
    stream.send(Op.RW, b"too much")
    stream.expect(Op.SHUTDOWN, flags=RCV)
    stream.send(Op.SHUTDOWN, flags=BOTH)
    assert stream.wait_closed() == -28


def test_guest_reset_closes_both_ends_with_econnreset(guest: Guest) -> None:
    in_r, in_w = pipe()
    out_r, out_w = pipe()
    stream = guest.open_from_host(in_fd=in_r, out_fd=out_w)
    stream.send(Op.RST)
    assert stream.wait_closed() == -104
    assert os.read(out_r, 10) == b""
    os.close(in_w)
    os.close(out_r)


def test_device_reset_ends_open_streams(guest: Guest) -> None:
    r, w = pipe()
    stream = guest.open_from_host(out_fd=w)
    guest.driver.w(0x70, 0)
    assert stream.wait_closed() == -104
    os.close(r)


def test_close_by_host_resets_stream(guest: Guest) -> None:
    ident = guest.connect_from_host(1024, tag=4)
    request = guest.expect(Op.REQUEST)
    guest.rig.lib.mv_vsock_close(guest.vsock, ident)
    guest.expect(Op.RST, src_port=request.src_port, dst_port=1024)
    guest.rig.until(lambda: guest.closed(4) == -125)


def test_stopped_reader_holds_credit_then_gets_all(guest: Guest) -> None:
    r, w = pipe()
    stream = guest.open_from_host(out_fd=w)
    sent = b""
    chunk = 0
    while len(sent) < stream.peer_alloc:
        data = bytes([chunk & 0xFF]) * min(65536, stream.peer_alloc - len(sent))
        stream.send(Op.RW, data)
        sent += data
        chunk += 1
    # All credit is used, and most of it waits in the device.
    got = b""
    while len(got) < len(sent):
        got += drain(r)
        guest.rig.step()
    assert got == sent
    while stream.expect(Op.CREDIT_UPDATE).fwd_cnt < len(sent):
        pass
    stream.send(Op.SHUTDOWN, flags=BOTH)
    stream.expect(Op.RST)
    assert stream.wait_closed() == 0
    assert os.read(r, 10) == b""
    os.close(r)


def test_guest_closes_before_reader_gets_all_written_first(guest: Guest) -> None:
    r, w = pipe()
    stream = guest.open_from_host(out_fd=w)
    sent = os.urandom(300_000)
    for at in range(0, len(sent), 50_000):
        stream.send(Op.RW, sent[at : at + 50_000])
    stream.send(Op.SHUTDOWN, flags=BOTH)
    assert guest.quiet(), "no RST while bytes wait"
    got = b""
    while len(got) < len(sent):
        got += drain(r)
        guest.rig.step()
    assert got == sent
    stream.expect(Op.RST)
    assert stream.wait_closed() == 0
    os.close(r)


def test_stopped_reader_does_not_stop_other_streams(guest: Guest) -> None:
    r1, w1 = pipe()
    r2, w2 = pipe()
    slow = guest.open_from_host(out_fd=w1, tag=1)
    quick = guest.open_from_host(out_fd=w2, tag=2)
    for _ in range(4):
        slow.send(Op.RW, bytes(65536))
    quick.send(Op.RW, b"through")
    assert os.read(r2, 100) == b"through"
    os.close(r1)
    os.close(r2)


def test_credit_of_guest_is_never_exceeded(guest: Guest) -> None:
    r, w = pipe()
    os.write(w, bytes(10_000))
    stream = guest.open_from_host(in_fd=r, buf_alloc=6000)
    got = len(stream.expect(Op.RW).data)
    while got < 6000:
        got += len(stream.expect(Op.RW).data)
    assert got == 6000
    assert guest.quiet()
    stream.send(Op.CREDIT_UPDATE, fwd_cnt=1)
    stream.expect(Op.RW, data=bytes(1))
    assert guest.quiet()
    os.close(w)


def test_stale_credit_update_is_passed_over(guest: Guest) -> None:
    r, w = pipe()
    stream = guest.open_from_host(in_fd=r, buf_alloc=100)
    os.write(w, bytes(200))
    stream.expect(Op.RW, data=bytes(100))
    stream.send(Op.CREDIT_UPDATE, fwd_cnt=60)
    stream.expect(Op.RW, data=bytes(60))
    stream.send(Op.CREDIT_UPDATE, fwd_cnt=10)
    assert guest.quiet()
    assert stream.closed() is None
    os.close(w)


def test_credit_comes_in_time_for_guest_with_small_window(guest: Guest) -> None:
    """Linux since 2026 sends no more than its own buf_alloc before it sees fwd_cnt move."""
    stream = guest.open_from_host(buf_alloc=8192)
    for i in range(1, 5):
        stream.send(Op.RW, bytes(2048))
        assert guest.quiet()
        stream.send(Op.RW, bytes(2048))
        stream.expect(Op.CREDIT_UPDATE, fwd_cnt=4096 * i)


def test_credit_request_is_answered(guest: Guest) -> None:
    r, w = pipe()
    stream = guest.open_from_host(out_fd=w)
    stream.send(Op.RW, b"123")
    stream.send(Op.CREDIT_REQUEST)
    stream.expect(Op.CREDIT_UPDATE, fwd_cnt=3)
    os.close(r)


def test_no_receive_buffers_input_waits_for_them(rig: Rig) -> None:
    guest = Guest(rig, buffers=2)
    r, w = pipe()
    stream = guest.open_from_host(in_fd=r)
    os.write(w, bytes(3 * 4052))
    rig.step(5)
    packets = guest.poll(refill=False)
    assert [len(p.data) for p in packets] == [4052, 4052]
    rig.step(3)
    guest.give(1)
    stream.expect(Op.RW, data=bytes(4052))
    os.close(w)


def test_large_transfer_both_ways_is_exact(guest: Guest) -> None:
    data = os.urandom(1 << 20)
    host, ours = socket.socketpair()
    host.setblocking(False)
    fd = ours.detach()
    stream = guest.open_from_host(in_fd=fd, out_fd=fd)
    sent = 0
    back = b""
    echoed = b""
    while len(back) < len(data):
        if sent < len(data):
            with contextlib.suppress(BlockingIOError):
                sent += host.send(data[sent : sent + 30_000])
        guest.rig.step()
        for packet in guest.poll():
            if packet.op == Op.RW:
                stream.got += len(packet.data)
                echoed += packet.data
                stream.send(Op.RW, packet.data)
        with contextlib.suppress(BlockingIOError):
            back += host.recv(1 << 20)
    assert back == data == echoed
    host.shutdown(socket.SHUT_WR)
    guest.rig.until(lambda: any(p.op == Op.SHUTDOWN for p in guest.poll()))
    stream.send(Op.RW, b"tail")
    stream.send(Op.SHUTDOWN, flags=SEND)
    guest.rig.step(2)
    host.setblocking(True)
    assert host.recv(10) == b"tail"
    assert host.recv(10) == b"", "half-close reaches the host's socket"
    host.close()


def test_regular_files_are_read_and_written_to_the_end(guest: Guest, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    data = os.urandom(200_000)
    source.write_bytes(data)
    stream = guest.open_from_host(
        in_fd=os.open(source, os.O_RDONLY), out_fd=os.open(target, os.O_WRONLY | os.O_CREAT)
    )
    assert stream.read(len(data)) == data
    stream.expect(Op.SHUTDOWN, flags=SEND)
    for at in range(0, len(data), 50_000):
        stream.send(Op.RW, data[at : at + 50_000])
    assert target.read_bytes() == data


def test_terminal_keeps_its_flags(guest: Guest) -> None:
    master, slave = pty.openpty()
    tty.setraw(slave)
    mode = termios.tcgetattr(slave)
    stream = guest.open_from_host(in_fd=dup(slave), out_fd=dup(slave))
    os.write(master, b"keys")
    assert stream.read(4) == b"keys"
    stream.send(Op.RW, b"screen")
    assert os.read(master, 100) == b"screen"
    assert os.get_blocking(slave), "O_NONBLOCK would be the user's to see"
    assert termios.tcgetattr(slave) == mode
    os.close(slave)
    os.close(master)
    stream.expect(Op.SHUTDOWN)  # the terminal is gone


def test_terminal_master_is_not_opened_anew(guest: Guest) -> None:
    """/proc/self/fd of a master is /dev/ptmx, another terminal: the descriptor itself is used."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    stream = guest.open_from_host(in_fd=dup(master), out_fd=dup(master))
    os.write(slave, b"from the program")
    assert stream.read(16) == b"from the program"
    text = os.urandom(1000).hex().encode()
    stream.send(Op.RW, text)
    got = b""
    while len(got) < len(text):
        got += drain(slave)
        guest.rig.step()
    assert got == text
    assert os.get_blocking(master)
    os.close(slave)
    os.close(master)


def test_pipe_keeps_its_flags(guest: Guest) -> None:
    in_r, in_w = pipe()
    out_r, out_w = pipe()
    guest.open_from_host(in_fd=dup(in_r), out_fd=dup(out_w))
    assert os.get_blocking(in_r)
    assert os.get_blocking(out_w)
    for fd in (in_r, in_w, out_r, out_w):
        os.close(fd)


def test_guest_connects_to_listener_and_is_served(guest: Guest) -> None:
    in_r, in_w = pipe()
    out_r, out_w = pipe()
    stream = guest.open_from_guest(SERVICE, in_fd=in_r, out_fd=out_w)
    stream.send(Op.RW, b"GET /")
    assert os.read(out_r, 10) == b"GET /"
    os.write(in_w, b"200")
    assert stream.read(3) == b"200"
    os.close(in_w)
    os.close(out_r)


def test_guest_connects_to_silent_port_is_refused(guest: Guest) -> None:
    guest.send(Packet(Op.REQUEST, 5000, 701))
    guest.expect(Op.RST, src_port=701, dst_port=5000)


def test_guest_connects_and_listener_refuses_is_reset(guest: Guest) -> None:
    guest.send(Packet(Op.REQUEST, 5000, SERVICE))
    guest.expect(Op.RST, src_port=SERVICE, dst_port=5000)


def test_listen_twice_is_refused(guest: Guest) -> None:
    assert guest.listen(SERVICE) == -98


def test_notify_through_eventfd_serves_as_well(rig: Rig) -> None:
    guest = Guest(rig)
    fd = rig.lib.rig_notify_fd(rig.ptr, guest.driver.device)
    assert fd >= 0
    r, w = pipe()
    stream = guest.open_from_host(out_fd=w)
    guest.driver.notify = lambda queue=0: os.eventfd_write(fd, 1)  # type: ignore[method-assign]
    stream.send(Op.RW, b"by eventfd")
    assert os.read(r, 100) == b"by eventfd"
    os.close(r)


def test_thousand_connections_each_gets_its_own_bytes(rig: Rig) -> None:
    guest = Guest(rig, buffers=64)
    ends = []
    for i in range(1000):
        host, ours = socket.socketpair()
        fd = ours.detach()
        stream = guest.open_from_host(in_fd=fd, out_fd=fd, prefix=b"%4d" % i, tag=i)
        assert stream.read(4) == b"%4d" % i
        ends.append((host, stream))
    for i, (host, stream) in enumerate(ends):
        stream.send(Op.RW, b"guest %d" % i)
        host.send(b"host %d" % i)
    for i, (host, stream) in enumerate(ends):
        assert host.recv(100) == b"guest %d" % i
        want = b"host %d" % i
        assert stream.read(len(want)) == want
    for host, stream in ends:
        stream.send(Op.SHUTDOWN, flags=BOTH)
        stream.expect(Op.RST)
        assert stream.wait_closed() == 0
        assert host.recv(1) == b""
        host.close()


def test_too_many_connections_are_refused(rig: Rig) -> None:
    guest = Guest(rig, buffers=64)
    for i in range(1024):
        assert guest.connect_from_host(1, tag=i) > 0
    r, w = pipe()
    assert guest.connect_from_host(1, in_fd=r, tag=2000) == -24
    with pytest.raises(BrokenPipeError):
        os.write(w, b"x")
    os.close(w)
