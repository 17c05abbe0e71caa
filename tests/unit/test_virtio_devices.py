"""rng, console and blk as a well-behaved driver uses them.

python -m pytest tests/unit/test_virtio_devices.py
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import Buf, Driver, Rig

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK = b"\0"
SECTORS = 256


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


# ---- rng -----------------------------------------------------------------------


def test_rng_request_is_random_and_whole(rig: Rig) -> None:
    rng = rig.rng().start()
    first, size = rng.request(256)
    assert size == 256
    assert first != rng.request(256)[0]


def test_rng_huge_request_gets_a_bounded_answer(rig: Rig) -> None:
    rng = rig.rng().start()
    ring = rng.rings[0]
    ring.add([Buf(0x100000, 8 << 20, True)])
    rng.notify()
    assert ring.take() == [(0, 65536)]
    assert rig.load(0x100000 + 65536, 4096) == bytes(4096)


# ---- console --------------------------------------------------------------------


def test_console_output_reaches_sink_in_order(rig: Rig) -> None:
    console = rig.console().start(queues=2)
    for part in (b"Linux ", b"version", b" 6.1\n"):
        console.request(part, queue=1)
    assert rig.sink() == b"Linux version 6.1\n"


def test_console_output_reaches_pipe(rig: Rig) -> None:
    r, w = os.pipe()
    console = rig.console(-1, w).start(queues=2)
    console.request(b"to ", b"the pipe", queue=1)
    assert os.read(r, 100) == b"to the pipe"
    os.close(r)


def test_console_input_fills_waiting_buffer(rig: Rig) -> None:
    r, w = os.pipe()
    console = rig.console(r).start(queues=2)
    ring = console.rings[0]
    gpa = console.alloc(64)
    ring.add([Buf(gpa, 64, True)])
    console.notify(0)
    rig.step(2)
    assert ring.take() == []
    os.write(w, b"ls\n")
    done: list[tuple[int, int]] = []
    rig.until(lambda: done.extend(ring.take()) or done)
    assert done == [(0, 3)]
    assert rig.load(gpa, 3) == b"ls\n"
    os.close(w)


def test_console_input_before_buffer_waits_in_descriptor(rig: Rig) -> None:
    r, w = os.pipe()
    os.write(w, b"typed ahead")
    console = rig.console(r).start(queues=2)
    rig.step(2)
    assert console.request(5, queue=0) == (b"typed", 5)
    assert console.request(64, queue=0)[0].startswith(b" ahead\0")
    os.close(w)


def test_console_end_of_input_is_silence(rig: Rig) -> None:
    r, w = os.pipe()
    console = rig.console(r).start(queues=2)
    os.close(w)
    ring = console.rings[0]
    ring.add([Buf(console.alloc(8), 8, True)])
    console.notify(0)
    rig.step(5)
    assert ring.take() == []


def test_console_one_socket_for_both_directions(rig: Rig) -> None:
    host, ours = socket.socketpair()
    fd = ours.detach()
    console = rig.console(fd, fd).start(queues=2)
    console.request(b"login: ", queue=1)
    assert host.recv(100) == b"login: "
    host.send(b"root")
    assert console.request(4, queue=0) == (b"root", 4)
    host.close()


# ---- blk -------------------------------------------------------------------------


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(512 * SECTORS))
    return path


@pytest.fixture
def blk(rig: Rig, image: Path) -> Driver:
    return rig.blk(os.open(image, os.O_RDWR), ident="root-disk").start()


def test_blk_capacity_is_the_image(blk: Driver) -> None:
    assert blk.r(0x100, 8) == SECTORS


def test_blk_read_returns_the_image(blk: Driver, image: Path) -> None:
    data, size = blk.request(header(IN, 3), 512, 1024, 1)
    assert data == image.read_bytes()[3 * 512 : 6 * 512] + OK
    assert size == 1537


def test_blk_read_of_last_sector_is_legal(blk: Driver, image: Path) -> None:
    assert blk.request(header(IN, SECTORS - 1), 512, 1)[0] == image.read_bytes()[-512:] + OK


def test_blk_read_with_status_in_data_descriptor_is_legal(blk: Driver, image: Path) -> None:
    assert blk.request(header(IN), 513)[0] == image.read_bytes()[:512] + OK


def test_blk_header_split_across_descriptors_is_legal(blk: Driver, image: Path) -> None:
    raw = header(IN, 1)
    assert blk.request(raw[:3], raw[3:9], raw[9:], 512, 1)[0] == image.read_bytes()[512:1024] + OK


def test_blk_write_then_flush_is_in_the_image(blk: Driver, image: Path) -> None:
    data = os.urandom(1024)
    assert blk.request(header(OUT, 7) + data[:100], data[100:], 1)[0] == OK
    assert blk.request(header(FLUSH), 1)[0] == OK
    assert image.read_bytes()[7 * 512 : 9 * 512] == data


def test_blk_get_id_is_padded(blk: Driver) -> None:
    assert blk.request(header(GET_ID), 20, 1) == (b"root-disk".ljust(20, b"\0") + OK, 21)


@pytest.mark.parametrize(("kind", "flags"), [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)])
def test_blk_ranges_are_zero_afterwards(blk: Driver, image: Path, kind: int, flags: int) -> None:
    before = image.read_bytes()
    ranges = struct.pack("<QIIQII", 8, 8, flags, 100, 1, flags)
    assert blk.request(header(kind), ranges, 1)[0] == OK
    after = image.read_bytes()
    assert len(after) == len(before)
    assert after[8 * 512 : 16 * 512] == bytes(8 * 512)
    assert after[100 * 512 : 101 * 512] == bytes(512)
    assert after[: 8 * 512] == before[: 8 * 512]
    assert after[101 * 512 :] == before[101 * 512 :]


def test_blk_many_requests_in_flight_all_complete(blk: Driver, image: Path) -> None:
    ring = blk.rings[0]
    head, status = blk.alloc(16, header(OUT, 9)), blk.alloc(1)
    want = {}
    for i in range(20):
        gpa = blk.alloc(512, bytes([i]) * 512)
        want[ring.add([Buf(head, 16), Buf(gpa, 512), Buf(status, 1, True)])] = 0
    blk.notify()
    got: dict[int, int] = {}
    blk.rig.until(lambda: got.update(ring.take()) or len(got) == 20)
    assert got.keys() == want.keys()
    assert len(set(image.read_bytes()[9 * 512 : 10 * 512])) == 1


def test_blk_read_only_offers_no_discard(rig: Rig, image: Path) -> None:
    blk = rig.blk(os.open(image, os.O_RDONLY), read_only=True).start()
    assert blk.offered & (1 << 5 | 1 << 13 | 1 << 14) == 1 << 5
    assert blk.request(header(IN), 512, 1)[0] == image.read_bytes()[:512] + OK


def test_blk_image_of_odd_size_is_refused(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(bytes(1000))
    with pytest.raises(OSError) as caught:
        rig.blk(os.open(path, os.O_RDWR))
    assert caught.value.errno == errno.EINVAL
