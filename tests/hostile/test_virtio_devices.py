"""Devices against a hostile driver: forged packets, requests past the end, floods.

python -m pytest tests/hostile/test_virtio_devices.py
"""

from __future__ import annotations

import os
import random
import resource
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import NEEDS_RESET, NEXT, RUNNING, STATUS, WRITE, Buf, Driver, Rig
from tests.rig.vsock import SEND, TX, Guest, Op, Packet, Stream

SERVICE = 700
EPROTO = -71


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(64 << 20) as rig:
        yield rig


@pytest.fixture
def guest(rig: Rig) -> Guest:
    guest = Guest(rig)
    assert guest.listen(SERVICE) == 0
    return guest


@pytest.fixture
def stream(guest: Guest) -> Iterator[Stream]:
    """An open stream whose output nobody wants."""
    yield guest.open_from_host(tag=1)


# ---- vsock --------------------------------------------------------------------


def test_vsock_length_beyond_buffer_resets_stream(guest: Guest, stream: Stream) -> None:
    stream.send(Op.RW, b"short", len=6)
    stream.expect(Op.RST)
    assert stream.wait_closed() == EPROTO


def test_vsock_length_of_4_gib_resets_stream(guest: Guest, stream: Stream) -> None:
    stream.send(Op.RW, b"short", len=0xFFFFFFFF)
    stream.expect(Op.RST)
    assert stream.wait_closed() == EPROTO


def test_vsock_buffer_longer_than_length_is_cut(guest: Guest) -> None:
    r, w = os.pipe()
    stream = guest.open_from_host(out_fd=w)
    stream.send(Op.RW, b"visible and not", len=7)
    assert os.read(r, 100) == b"visible"
    os.close(r)


@pytest.mark.parametrize("size", [0, 1, 43])
def test_vsock_packet_shorter_than_header_is_dropped(guest: Guest, size: int) -> None:
    if size:
        guest.send(Packet(Op.REQUEST, 1, SERVICE), readable=size)
    else:
        ring = guest.driver.rings[TX]
        ring.put_desc(0, 0, 0)
        ring.put_avail(0)
        guest.driver.notify(TX)
    assert guest.quiet()
    assert guest.driver.status == RUNNING


@pytest.mark.parametrize("cid", [0, 1, 2, 4, 0xFFFFFFFF, 3 | 1 << 32])
def test_vsock_forged_source_cid_is_dropped(guest: Guest, cid: int) -> None:
    guest.send(Packet(Op.REQUEST, 5000, 1, src_cid=cid))
    assert guest.quiet()


@pytest.mark.parametrize("cid", [0, 1, 3, 4, 0xFFFFFFFF, 2 | 1 << 32])
def test_vsock_foreign_destination_cid_is_dropped(guest: Guest, cid: int) -> None:
    guest.send(Packet(Op.REQUEST, 5000, SERVICE, dst_cid=cid))
    assert guest.quiet()


def test_vsock_forged_cid_does_not_touch_stream(guest: Guest, stream: Stream) -> None:
    stream.send(Op.RST, src_cid=7)
    guest.rig.step(3)
    assert stream.closed() is None


@pytest.mark.parametrize("op", [0, 8, 0xFFFF])
def test_vsock_unknown_operation_resets(guest: Guest, stream: Stream, op: int) -> None:
    guest.send(Packet(op, 5000, 1))
    guest.expect(Op.RST, src_port=1, dst_port=5000)
    guest.send(Packet(op, stream.header.src_port, stream.header.dst_port))
    stream.expect(Op.RST)


@pytest.mark.parametrize("kind", [0, 2, 0xFFFF])
def test_vsock_unknown_type_is_reset_in_kind(guest: Guest, kind: int) -> None:
    guest.send(Packet(Op.REQUEST, 5000, SERVICE, type=kind))
    guest.expect(Op.RST, type=kind)


def test_vsock_reset_of_unknown_stream_is_not_answered(guest: Guest) -> None:
    guest.send(Packet(Op.RST, 5000, 1))
    assert guest.quiet()


@pytest.mark.parametrize(
    "op", [Op.RESPONSE, Op.SHUTDOWN, Op.RW, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST]
)
def test_vsock_packet_of_unknown_stream_is_reset(guest: Guest, op: Op) -> None:
    guest.send(Packet(op, 5000, 1))
    guest.expect(Op.RST, src_port=1, dst_port=5000)


def test_vsock_request_twice_resets_stream(guest: Guest) -> None:
    stream = guest.open_from_guest(SERVICE, tag=3)
    stream.send(Op.REQUEST)
    stream.expect(Op.RST)
    assert stream.wait_closed() == EPROTO


def test_vsock_response_unasked_resets_stream(guest: Guest, stream: Stream) -> None:
    stream.send(Op.RESPONSE)
    stream.expect(Op.RST)


def test_vsock_data_before_response_resets_stream(guest: Guest) -> None:
    guest.connect_from_host(1024, tag=2)
    request = guest.expect(Op.REQUEST)
    guest.send(Packet(Op.RW, 1024, request.src_port, b"early"))
    guest.expect(Op.RST)
    guest.rig.until(lambda: guest.closed(2) == EPROTO)


def test_vsock_data_after_shutdown_resets_stream(guest: Guest, stream: Stream) -> None:
    stream.send(Op.SHUTDOWN, flags=SEND)
    stream.send(Op.RW, b"one more thing")
    stream.expect(Op.RST)
    assert stream.wait_closed() == EPROTO


def test_vsock_shutdown_flags_beyond_two_are_ignored(guest: Guest, stream: Stream) -> None:
    stream.send(Op.SHUTDOWN, flags=0xFFFFFFFC)
    assert guest.quiet()
    assert stream.closed() is None


def test_vsock_data_beyond_credit_resets_stream(guest: Guest) -> None:
    r, w = os.pipe()  # a reader that has stopped
    stream = guest.open_from_host(out_fd=w, tag=2)
    for _ in range(stream.peer_alloc // 65536 + 1):
        stream.send(Op.RW, bytes(65536))
    assert guest.quiet(), "the pipe took the first 64 KiB, so this is still within credit"
    stream.send(Op.RW, bytes(1))
    stream.expect(Op.RST)
    assert stream.wait_closed() == EPROTO
    os.close(r)


def test_vsock_reading_what_was_not_sent_resets_stream(guest: Guest, stream: Stream) -> None:
    stream.send(Op.CREDIT_UPDATE, fwd_cnt=1)
    stream.expect(Op.RST)
    assert stream.wait_closed() == EPROTO


def test_vsock_credit_of_4_gib_is_only_a_number(guest: Guest) -> None:
    r, w = os.pipe()
    stream = guest.open_from_host(in_fd=r, buf_alloc=0xFFFFFFFF)
    os.write(w, bytes(50_000))
    got = 0
    while got < 50_000:
        got += len(stream.expect(Op.RW).data)
    os.close(w)


def test_vsock_credit_withdrawn_stops_sending(guest: Guest) -> None:
    r, w = os.pipe()
    stream = guest.open_from_host(in_fd=r)
    os.write(w, bytes(100))
    stream.expect(Op.RW, data=bytes(100))
    stream.send(Op.CREDIT_UPDATE, buf_alloc=50, fwd_cnt=0)
    os.write(w, bytes(100))
    assert guest.quiet()
    os.close(w)


@pytest.mark.parametrize("size", [1, 43])
def test_vsock_receive_buffer_without_room_needs_reset(rig: Rig, size: int) -> None:
    guest = Guest(rig, buffers=1, rx_size=size)
    guest.connect_from_host(1024, tag=1)
    assert guest.driver.status & NEEDS_RESET
    rig.until(lambda: guest.closed(1) == EPROTO)


def test_vsock_broken_ring_ends_its_streams(guest: Guest, stream: Stream) -> None:
    ring = guest.driver.rings[TX]
    ring.put_avail(ring.size)
    guest.driver.notify(TX)
    assert guest.driver.status & NEEDS_RESET
    assert stream.wait_closed() == EPROTO


def test_vsock_flood_without_receive_buffers_is_bounded(rig: Rig) -> None:
    """Every packet asks for a RST, and none can be sent: transmit stops, memory does not grow."""
    guest = Guest(rig, buffers=0, size=256)
    ring = guest.driver.rings[TX]
    gpa = guest.driver.alloc(44)
    rig.store(gpa, Packet(Op.RW, 5000, 1).header())
    for i in range(256):
        ring.put_desc(i, gpa, 44)
    for _ in range(16):
        room = 256 - ((ring.avail_idx - ring.used_idx) & 0xFFFF)
        ring.put_avail(*range(room))
        guest.driver.notify(TX)
        rig.step(2)
    assert ring.used_idx < 2048
    assert ring.avail_idx > ring.used_idx
    done = 0
    for _ in range(200):
        guest.give(32 if not done else 0)
        done += len(guest.poll())
        rig.step()
        if ring.used_idx == ring.avail_idx:
            break
    assert ring.used_idx == ring.avail_idx, "it goes on when there is room"


def test_vsock_flood_of_connections_is_bounded(rig: Rig) -> None:
    guest = Guest(rig, buffers=60, size=64)
    guest.listen(SERVICE)
    refused = accepted = 0
    for i in range(1500):
        rig.lib.rig_offer(rig.ptr, -1, -1, i)
        guest.send(Packet(Op.REQUEST, 10_000 + i, SERVICE))
        rig.step()
        for packet in guest.poll():
            refused += packet.op == Op.RST
            accepted += packet.op == Op.RESPONSE
    assert (accepted, refused) == (1024, 476)


def test_vsock_random_packets_never_crash(rig: Rig) -> None:
    rand = random.Random(2)
    guest = Guest(rig, buffers=40)
    guest.listen(SERVICE)
    fds: list[int] = []
    for i in range(40):
        r, w = os.pipe()
        fds += [r]
        assert guest.connect_from_host(1024 + i % 4, out_fd=w, tag=i) > 0
    ports = [p.src_port for p in guest.poll()]
    for i in range(4000):
        if i % 50 == 0:
            rig.lib.rig_offer(rig.ptr, -1, -1, 1000 + i)
        packet = Packet(
            rand.randrange(9),
            rand.choice([1024, 1025, 1026, 1027, 5]),
            rand.choice([SERVICE, 0x40000000 + rand.randrange(45), *ports[:3]]),
            bytes(rand.choice([0, 1, 1000, 60_000])),
            flags=rand.randrange(4),
            buf_alloc=rand.choice([0, 1, 1 << 18, 0xFFFFFFFF]),
            fwd_cnt=rand.choice([0, 0, 1, 0xFFFFFFFF]),
            src_cid=rand.choice([3, 3, 3, 3, 2]),
            len=rand.choice([None, None, None, 0, 5, 0xFFFFFFFF]),
        )
        guest.send(packet, split=rand.choice([0, 0, 1, 43]))
        guest.poll()
        rig.step()
    assert guest.driver.status == RUNNING
    for fd in fds:
        os.close(fd)


def test_vsock_reset_in_mid_transfer_leaves_memory_alone(rig: Rig) -> None:
    """The loop's thread fills buffers when the driver resets; afterwards nothing is written."""
    guest = Guest(rig, buffers=32)
    rig.start_loop()
    for turn in range(30):
        zero = os.open("/dev/zero", os.O_RDONLY)
        guest.connect_from_host(1024, in_fd=zero, tag=turn)
        request = guest.expect(Op.REQUEST)
        guest.send(Packet(Op.RESPONSE, 1024, request.src_port, buf_alloc=1 << 30))
        rig.until(lambda: guest.poll())
        guest.driver.w(STATUS, 0)
        rig.store(0x10000, b"\xa5" * 0xC000)
        area = rig.load(0x10000, 0xC000)
        rig.until(lambda turn=turn: guest.closed(turn) is not None)
        assert rig.load(0x10000, 0xC000) == area
        guest._where.clear()
        guest._queue.clear()
        guest._tx_free.clear()
        guest.driver._heap = 0x100000
        guest.driver.start(queues=3)
        guest.give(32)


# ---- console -------------------------------------------------------------------


def test_console_flood_against_stopped_reader_is_bounded(rig: Rig) -> None:
    r, w = os.pipe()
    console = rig.console(-1, w).start(queues=2)
    ring = console.rings[1]
    gpa = console.alloc(4096, bytes(4096))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = 0
    while ring.free:
        ring.add([Buf(gpa, 4096)])
        console.notify(1)
        sent += 1
        ring.take()
        assert sent < 1000, "the device takes all, for ever"
    held = sent - 64
    assert held * 4096 <= 65536 + 65536 + 4096, "a pipe and a buffer, no more"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096
    got = 0
    while got < sent * 4096:
        got += len(os.read(r, 1 << 20))
        rig.step()
        ring.take()
    assert len(ring.free) == 64
    os.close(r)


def test_console_reader_gone_output_is_dropped(rig: Rig) -> None:
    r, w = os.pipe()
    console = rig.console(-1, w).start(queues=2)
    os.close(r)
    for _ in range(100):
        console.request(bytes(5000), queue=1)


def test_console_writable_transmit_buffer_is_completed_empty(rig: Rig) -> None:
    console = rig.console().start(queues=2)
    assert console.request(16, queue=1) == (bytes(16), 0)
    assert rig.sink() == b""


def test_console_readable_receive_buffer_is_completed_empty(rig: Rig) -> None:
    r, w = os.pipe()
    os.write(w, b"keys")
    console = rig.console(r).start(queues=2)
    assert console.request(b"not a buffer for input", queue=0) == (b"", 0)
    assert console.request(16, queue=0) == (b"keys".ljust(16, b"\0"), 4)
    os.close(w)


# ---- blk -----------------------------------------------------------------------

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"
SECTORS = 64


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * (2 * SECTORS))
    return path


@pytest.fixture
def blk(rig: Rig, image: Path) -> Driver:
    return rig.blk(os.open(image, os.O_RDWR)).start()


@pytest.mark.parametrize(
    ("sector", "size"),
    [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (0, 512 * (SECTORS + 1)),
        (0xFFFFFFFFFFFFFFFF, 512),
        (1 << 55, 512),  # * 512 wraps to 0
        ((1 << 55) - 1, 1024),
        (0, 511),
        (0, 513),
        (0, 1),
    ],
)
@pytest.mark.parametrize("kind", [IN, OUT])
def test_blk_past_the_end_or_odd_is_refused(
    blk: Driver, image: Path, kind: int, sector: int, size: int
) -> None:
    before = image.read_bytes()
    if kind == IN:
        data, _ = blk.request(header(IN, sector), size, 1)
        assert data == bytes(size) + IOERR
    else:
        assert blk.request(header(OUT, sector), b"x" * size, 1)[0] == IOERR
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", [OUT, DISCARD, WRITE_ZEROES])
def test_blk_write_to_read_only_is_refused(rig: Rig, image: Path, kind: int) -> None:
    before = image.read_bytes()
    blk = rig.blk(os.open(image, os.O_RDWR), read_only=True).start()
    data = bytes(512) if kind == OUT else struct.pack("<QII", 0, 1, 0)
    assert blk.request(header(kind), data, 1)[0] == IOERR
    assert image.read_bytes() == before
    assert blk.offered & 1 << 5


@pytest.mark.parametrize(
    ("kind", "sector", "count", "flags", "status"),
    [
        (DISCARD, SECTORS, 1, 0, IOERR),
        (DISCARD, SECTORS - 1, 2, 0, IOERR),
        (DISCARD, 0xFFFFFFFFFFFFFFFF, 1, 0, IOERR),
        (DISCARD, 0, 0xFFFFFFFF, 0, IOERR),
        (DISCARD, 0, 1, 1, UNSUPP),
        (WRITE_ZEROES, 0, 0xFFFFFFFF, 0, IOERR),
        (WRITE_ZEROES, 0, 1, 2, UNSUPP),
        (WRITE_ZEROES, 0, 1, 0xFFFFFFFF, UNSUPP),
    ],
)
def test_blk_bad_range_is_refused(
    blk: Driver, image: Path, kind: int, sector: int, count: int, flags: int, status: bytes
) -> None:
    before = image.read_bytes()
    good = struct.pack("<QII", 0, 1, 0)
    bad = struct.pack("<QII", sector, count, flags)
    assert blk.request(header(kind), good + bad, 1)[0] == status
    assert image.read_bytes() == before, "all ranges are checked before the first is done"


@pytest.mark.parametrize("size", [0, 1, 15, 17, 16 * 17])
def test_blk_range_list_of_odd_size_is_refused(blk: Driver, size: int) -> None:
    parts = [bytes(size)] if size else []
    assert blk.request(header(DISCARD), *parts, 1)[0] == IOERR


def test_blk_unknown_request_is_unsupported(blk: Driver) -> None:
    for kind in (2, 3, 5, 14, 0x80000000, 0xFFFFFFFF):
        assert blk.request(header(kind), 1)[0] == UNSUPP


@pytest.mark.parametrize("size", [1, 8, 15])
def test_blk_header_too_short_is_refused(blk: Driver, size: int) -> None:
    assert blk.request(header(IN)[:size], 512, 1)[0] == bytes(512) + IOERR


def test_blk_without_status_completes_and_does_nothing(blk: Driver, image: Path) -> None:
    before = image.read_bytes()
    assert blk.request(header(OUT), b"x" * 512) == (b"", 0)
    assert image.read_bytes() == before


def test_blk_zero_length_status_completes_and_does_nothing(blk: Driver) -> None:
    ring = blk.rings[0]
    ring.add([Buf(blk.alloc(16, header(FLUSH)), 16), Buf(0, 0, True)])
    blk.notify()
    blk.rig.until(ring.take)


def test_blk_status_readable_only_completes_and_does_nothing(blk: Driver) -> None:
    assert blk.request(header(FLUSH), b"\xff") == (b"", 0)


def test_blk_image_cut_short_is_an_error_not_a_crash(blk: Driver, image: Path) -> None:
    os.truncate(image, 512)
    assert blk.request(header(IN, 8), 512, 1)[0][-1:] == IOERR


def test_blk_unbounded_requests_all_complete(rig: Rig, image: Path) -> None:
    """The same descriptors again and again, far ahead of the device."""
    blk = rig.blk(os.open(image, os.O_RDWR)).start(size=64)
    ring = blk.rings[0]
    ring.put_desc(0, blk.alloc(16, header(OUT)), 16, NEXT, 1)
    ring.put_desc(1, blk.alloc(512), 512, NEXT, 2)
    ring.put_desc(2, blk.alloc(1), 1, WRITE)
    sent = 0
    for _ in range(100):
        room = 64 - ((ring.avail_idx - ring.used_idx) & 0xFFFF)
        ring.put_avail(*[0] * room)
        sent += room
        blk.notify()
    rig.until(lambda: ring.used_idx == sent & 0xFFFF)


def test_blk_reset_in_mid_write_then_serves_again(rig: Rig, image: Path) -> None:
    blk = rig.blk(os.open(image, os.O_RDWR)).start(size=64)
    for turn in range(100):
        ring = blk.rings[0]
        blk._heap = 0x100000
        data = blk.alloc(512 * 16, bytes([turn]) * 512 * 16)
        head = blk.alloc(16, header(OUT))
        for _ in range(16):
            ring.add([Buf(head, 16), Buf(data, 512 * 16), Buf(blk.alloc(1), 1, True)])
        blk.notify()
        blk.w(STATUS, 0)
        done = ring.used_idx
        time.sleep(0.0005)
        assert ring.used_idx == done, "nothing completes after a reset"
        blk.start(size=64)
    assert blk.request(header(IN), 512, 1)[0][-1:] == OK


def test_blk_reset_races_with_notifications(rig: Rig, image: Path) -> None:
    blk = rig.blk(os.open(image, os.O_RDWR)).start(size=16)
    ring = blk.rings[0]
    ring.put_desc(0, blk.alloc(16, header(OUT)), 16, NEXT, 1)
    ring.put_desc(1, blk.alloc(512 * 32), 512 * 32, NEXT, 2)
    ring.put_desc(2, blk.alloc(1), 1, WRITE)
    stop = threading.Event()

    def ring_the_bell() -> None:
        while not stop.is_set():
            blk.notify()

    thread = threading.Thread(target=ring_the_bell)
    thread.start()
    try:
        for _ in range(200):
            ring.avail_idx = 0
            ring.put_avail(*[0] * 16)
            blk.w(STATUS, 0)
            rig.store(ring.used, bytes(200))
            assert blk.negotiate()
            assert blk.set_queue(0, 16, ring.desc, ring.avail, ring.used)
            blk.w(STATUS, RUNNING)
    finally:
        stop.set()
        thread.join()
    assert blk.start().request(header(IN), 512, 1)[0][-1:] == OK
