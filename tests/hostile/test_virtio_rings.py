"""Registers and rings as a hostile driver writes them: nothing outside RAM, no hang, no crash.

A ring that breaks the rules ends in DEVICE_NEEDS_RESET and comes back with a reset; a register
written at the wrong time, or with nonsense, is ignored. `make asan` runs the same under ASan.

    python -m pytest tests/hostile/test_virtio_rings.py
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.rig import (
    ACKNOWLEDGE,
    CONFIG,
    DRIVER,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    DRIVER_OK,
    F_EVENT_IDX,
    F_INDIRECT,
    F_VERSION_1,
    FAILED,
    FEATURES_OK,
    INDIRECT,
    INTERRUPT_STATUS,
    MAGIC,
    MMIO,
    NEEDS_RESET,
    NEXT,
    QUEUE_DESC,
    QUEUE_READY,
    QUEUE_SEL,
    QUEUE_SIZE,
    QUEUE_SIZE_MAX,
    RUNNING,
    STATUS,
    WRITE,
    Buf,
    Driver,
    Rig,
    Ring,
)

RAM = 16 << 20
HIGH = 1 << 32


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Low RAM, a hole, and RAM above 4 GiB."""
    with Rig(RAM) as rig:
        assert rig.add_ram(HIGH, RAM) == 0
        yield rig


@pytest.fixture
def rng(rig: Rig) -> Driver:
    return rig.rng()


def desc(addr: int, size: int, flags: int = 0, next_: int = 0) -> bytes:
    return struct.pack("<QIHH", addr, size, flags, next_)


# ---- registers ---------------------------------------------------------------


def test_status_without_version_1_refuses_features_ok(rng: Driver) -> None:
    assert not rng.negotiate(F_EVENT_IDX)


def test_status_with_features_not_offered_refuses_features_ok(rng: Driver) -> None:
    assert not rng.negotiate(F_VERSION_1 | 1)
    assert not rng.negotiate(F_VERSION_1 | 1 << 63)


@pytest.mark.parametrize("value", [DRIVER_OK, FEATURES_OK, DRIVER | DRIVER_OK, FEATURES_OK | 4])
def test_status_out_of_order_is_ignored(rng: Driver, value: int) -> None:
    rng.w(STATUS, value)
    assert rng.status == 0


def test_status_bits_cannot_be_cleared_but_by_reset(rng: Driver) -> None:
    rng.start()
    rng.w(STATUS, ACKNOWLEDGE)
    assert rng.status == RUNNING


def test_status_needs_reset_cannot_be_set_by_the_driver(rng: Driver) -> None:
    rng.start()
    rng.w(STATUS, RUNNING | NEEDS_RESET | 0xFFFFFF00)
    assert rng.status == RUNNING


def test_status_failed_stops_the_device(rng: Driver) -> None:
    ring = rng.start().rings[0]
    rng.w(STATUS, RUNNING | FAILED)
    ring.add([Buf(rng.alloc(8), 8, True)])
    rng.notify()
    assert ring.take() == []


def test_features_after_features_ok_are_frozen(rng: Driver) -> None:
    assert rng.negotiate(F_VERSION_1)
    rng.w(DRIVER_FEATURES_SEL, 0)
    rng.w(DRIVER_FEATURES, F_INDIRECT)
    ring = Ring(rng.rig, 8, 0x10000, 0x12000, 0x13000)
    assert rng.set_queue(0, 8, ring.desc, ring.avail, ring.used)
    rng.w(STATUS, RUNNING)
    table = rng.alloc(16, desc(rng.alloc(16), 16, WRITE))
    ring.put_desc(0, table, 16, INDIRECT)
    ring.put_avail(0)
    rng.notify()
    assert rng.status & NEEDS_RESET, "an indirect table that was not negotiated"


@pytest.mark.parametrize("size", [0, 3, 6, 255, 257, 512, 0x10000, 0x10001, 0xFFFFFFFF])
def test_queue_size_wrong_is_not_ready(rng: Driver, size: int) -> None:
    assert rng.negotiate()
    assert not rng.set_queue(0, size, 0x10000, 0x12000, 0x13000)


@pytest.mark.parametrize(
    "rings",
    [
        (0x10008, 0x12000, 0x13000),  # misaligned, each
        (0x10000, 0x12001, 0x13000),
        (0x10000, 0x12000, 0x13002),
        (RAM, 0x12000, 0x13000),  # in the hole
        (MMIO, 0x12000, 0x13000),  # in our own registers
        (0x10000, MMIO, 0x13000),
        (0x10000, 0x12000, MMIO),
        (RAM - 16, 0x12000, 0x13000),  # across the end of RAM
        (0x10000, RAM - 4, 0x13000),
        (0x10000, 0x12000, RAM - 8),
        (0x10000, RAM - (4 + 2 * 64), 0x13000),  # used_event just outside
        (0x10000, 0x12000, RAM - (4 + 8 * 64)),  # avail_event just outside
        (0xFFFFFFFFFFFFFFF0, 0x12000, 0x13000),  # wraps
        (0x10000, 0xFFFFFFFFFFFFFFFE, 0x13000),
        (0x10000, 0x12000, 0xFFFFFFFFFFFFFFFC),
    ],
)
def test_queue_outside_ram_or_misaligned_is_not_ready(
    rng: Driver, rings: tuple[int, int, int]
) -> None:
    assert rng.negotiate()
    assert not rng.set_queue(0, 64, *rings)


def test_queue_changed_after_driver_ok_stays_as_it_was(rng: Driver) -> None:
    rng.start()
    rng.w(QUEUE_SEL, 0)
    rng.w(QUEUE_SIZE, 2)
    rng.w(QUEUE_DESC, MMIO)
    rng.w(QUEUE_READY, 0)
    rng.w(QUEUE_READY, 1)
    assert rng.request(8)[1] == 8


def test_queue_changed_while_ready_stays_as_it_was(rng: Driver) -> None:
    assert rng.negotiate()
    ring = Ring(rng.rig, 64, 0x10000, 0x12000, 0x13000)
    assert rng.set_queue(0, 64, ring.desc, ring.avail, ring.used)
    rng.w(QUEUE_DESC, 0x20000)
    rng.w(QUEUE_SIZE, 0)
    rng.w(STATUS, RUNNING)
    rng.rings = [ring]
    assert rng.request(8)[1] == 8


def test_queue_made_ready_after_driver_ok_is_ignored(rng: Driver) -> None:
    assert rng.negotiate()
    rng.w(STATUS, RUNNING)
    assert not rng.set_queue(0, 64, 0x10000, 0x12000, 0x13000)
    rng.notify()


@pytest.mark.parametrize("queue", [1, 8, 0xFFFF, 0x80000000, 0xFFFFFFFF])
def test_notify_and_select_of_absent_queue_are_ignored(rng: Driver, queue: int) -> None:
    rng.start()
    rng.notify(queue)
    rng.w(QUEUE_SEL, queue)
    assert rng.r(QUEUE_SIZE_MAX) == 0
    for reg in (QUEUE_SIZE, QUEUE_DESC, QUEUE_READY):
        rng.w(reg, 0xFFFFFFFF)
    assert rng.request(8)[1] == 8


def test_notify_before_driver_ok_is_ignored(rng: Driver) -> None:
    assert rng.negotiate()
    ring = Ring(rng.rig, 64, 0x10000, 0x12000, 0x13000)
    assert rng.set_queue(0, 64, ring.desc, ring.avail, ring.used)
    ring.add([Buf(rng.alloc(8), 8, True)])
    rng.notify()
    assert ring.take() == []


@pytest.mark.parametrize("size", [1, 2, 8])
def test_registers_of_odd_width_read_zero_and_ignore_writes(rng: Driver, size: int) -> None:
    assert rng.r(MAGIC, size) == 0
    rng.w(STATUS, ACKNOWLEDGE, size)
    assert rng.status == 0


def test_registers_misaligned_read_zero_and_ignore_writes(rng: Driver) -> None:
    assert rng.r(MAGIC + 1) == 0
    rng.w(STATUS - 1, ACKNOWLEDGE << 8)
    assert rng.status == 0


def test_registers_across_the_page_are_nobodys(rng: Driver) -> None:
    assert rng.r(0xFFE) == 0xFFFFFFFF
    rng.w(0xFFD, 0xFFFFFFFF)


def test_config_beyond_its_end_reads_zero_and_ignores_writes(rig: Rig) -> None:
    _, vsock = rig.vsock()
    for size in (1, 2, 4, 8):
        assert vsock.r(CONFIG + 8, size) == 0
        assert vsock.r(CONFIG + 8 - size + 1, size) == 0
        vsock.w(CONFIG, 0xFFFFFFFFFFFFFFFF, size)
    assert vsock.r(CONFIG, 8) == 3


def test_every_register_with_every_bit_does_not_crash(rig: Rig) -> None:
    devices = [rig.rng(0), rig.console(slot=1), rig.vsock(2)[1]]
    for device in devices:
        for value in (0xFFFFFFFF, 0, 0x55555555, 1):
            for reg in range(0, 0x200, 4):
                device.w(reg, value)
                device.r(reg)
        device.w(STATUS, 0)
        assert device.status == 0


# ---- rings -------------------------------------------------------------------

Breakage = Callable[[Rig, Driver, Ring], None]


def _loop(_: Rig, rng: Driver, ring: Ring) -> None:
    ring.put_desc(0, rng.alloc(8), 8, WRITE | NEXT, 0)
    ring.put_avail(0)


def _long_loop(_: Rig, rng: Driver, ring: Ring) -> None:
    for i in range(ring.size):
        ring.put_desc(i, rng.alloc(8), 8, WRITE | NEXT, (i + 1) % ring.size)
    ring.put_avail(0)


def _head_out_of_range(_: Rig, _rng: Driver, ring: Ring) -> None:
    ring.put_avail(ring.size)


def _next_out_of_range(_: Rig, rng: Driver, ring: Ring) -> None:
    ring.put_desc(0, rng.alloc(8), 8, WRITE | NEXT, ring.size)
    ring.put_avail(0)


def _next_far_out_of_range(_: Rig, rng: Driver, ring: Ring) -> None:
    ring.put_desc(0, rng.alloc(8), 8, WRITE | NEXT, 0xFFFF)
    ring.put_avail(0)


def _avail_jumps(rig: Rig, _rng: Driver, ring: Ring) -> None:
    rig.store(ring.avail + 2, struct.pack("<H", ring.size + 1))


def _avail_steps_back(rig: Rig, _rng: Driver, ring: Ring) -> None:
    rig.store(ring.avail + 2, struct.pack("<H", 0xFFFF))


def _readable_after_writable(_: Rig, rng: Driver, ring: Ring) -> None:
    ring.add([Buf(rng.alloc(8), 8, True), Buf(rng.alloc(8), 8)])


def _buffer(addr: int, size: int) -> Breakage:
    def breakage(_: Rig, _rng: Driver, ring: Ring) -> None:
        ring.put_desc(0, addr, size, WRITE)
        ring.put_avail(0)

    return breakage


def _indirect(size: int, *entries: bytes, flags: int = 0) -> Breakage:
    def breakage(_: Rig, rng: Driver, ring: Ring) -> None:
        table = rng.alloc(4096, b"".join(entries))
        ring.put_desc(0, table, size, INDIRECT | flags, 1)
        ring.put_desc(1, table, 16, WRITE)
        ring.put_avail(0)

    return breakage


def _indirect_outside(addr: int) -> Breakage:
    def breakage(_: Rig, _rng: Driver, ring: Ring) -> None:
        ring.put_desc(0, addr, 32, INDIRECT)
        ring.put_avail(0)

    return breakage


ONE = desc(0x200000, 16, WRITE)
BREAKAGES: dict[str, Breakage] = {
    "loop": _loop,
    "long_loop": _long_loop,
    "head_out_of_range": _head_out_of_range,
    "next_out_of_range": _next_out_of_range,
    "next_far_out_of_range": _next_far_out_of_range,
    "avail_jumps": _avail_jumps,
    "avail_steps_back": _avail_steps_back,
    "readable_after_writable": _readable_after_writable,
    "buffer_wraps": _buffer(0xFFFFFFFFFFFFFFF8, 16),
    "buffer_wraps_to_all": _buffer(0x1000, 0xFFFFFFFF),
    "buffer_past_end": _buffer(RAM - 8, 9),
    "buffer_in_hole": _buffer(RAM, 1),
    "buffer_over_hole": _buffer(RAM - 8, 0xFFFFFFFF),
    "buffer_in_mmio": _buffer(MMIO, 4),
    "buffer_past_high_end": _buffer(HIGH + RAM - 1, 2),
    "indirect_empty": _indirect(0),
    "indirect_odd": _indirect(17, ONE),
    "indirect_too_small": _indirect(15, ONE),
    "indirect_huge": _indirect(16 * 257, ONE),
    "indirect_whole_ram": _indirect(0xFFFFFFF0, ONE),
    "indirect_nested": _indirect(32, desc(0x200000, 16, INDIRECT), ONE),
    "indirect_nested_second": _indirect(32, desc(0x200000, 16, WRITE | NEXT, 1), desc(0, 16, 4)),
    "indirect_with_next": _indirect(16, ONE, flags=NEXT),
    "indirect_next_outside": _indirect(16, desc(0x200000, 16, WRITE | NEXT, 1)),
    "indirect_loop": _indirect(32, desc(0x200000, 1, WRITE | NEXT, 0)),
    "indirect_in_hole": _indirect_outside(RAM),
    "indirect_in_mmio": _indirect_outside(MMIO),
    "indirect_across_end": _indirect_outside(RAM - 16),
    "indirect_wraps": _indirect_outside(0xFFFFFFFFFFFFFFF0),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_ring_broken_needs_reset_and_recovers(rig: Rig, rng: Driver, name: str) -> None:
    ring = rng.start(size=16).rings[0]
    BREAKAGES[name](rig, rng, ring)
    rng.notify()
    assert rng.status & NEEDS_RESET
    assert rng.r(INTERRUPT_STATUS) & 2, "a configuration change, §2.1.2"
    assert ring.take() == []
    rng.notify()  # dead: nothing more is looked at
    assert rng.start().request(8)[1] == 8


def test_ring_of_full_length_chain_is_legal(rng: Driver) -> None:
    ring = rng.start(size=16).rings[0]
    ring.add([Buf(rng.alloc(4), 4, True) for _ in range(16)])
    rng.notify()
    assert ring.take() == [(0, 64)]


def test_ring_as_its_own_buffer_ends_in_the_guest(rig: Rig, rng: Driver) -> None:
    """Random bytes over descriptors, avail and used ring: whatever follows stays in the rings."""
    for gpa in (0x10000, 0x12000, 0x13000):
        ring = rng.start(size=16).rings[0]
        before = rig.load(0x100000, 4096)
        for _ in range(8):
            ring.put_desc(0, gpa, 0x1000, WRITE)
            ring.put_avail(0)
            rng.notify()
        assert rig.load(0x100000, 4096) == before
    assert rng.start().request(8)[1] == 8


def test_ring_rings_overlapping_each_other_do_not_hang(rng: Driver) -> None:
    assert rng.negotiate()
    assert rng.set_queue(0, 16, 0x10000, 0x10000, 0x10000)
    rng.w(STATUS, RUNNING)
    for _ in range(100):
        rng.notify()


def test_ring_all_chains_to_one_descriptor_are_served_once_each(rng: Driver) -> None:
    ring = rng.start(size=16).rings[0]
    ring.put_desc(7, rng.alloc(8), 8, WRITE)
    ring.put_avail(*[7] * 16)
    rng.notify()
    assert ring.take() == [(7, 8)] * 16


def test_ring_sum_of_lengths_beyond_32_bits_needs_reset() -> None:
    size = 3 << 30
    with Rig(size) as rig:
        rng = rig.rng()
        ring = rng.start(size=16).rings[0]
        ring.add([Buf(0, size - 4096, True), Buf(0, size - 4096, True)])
        rng.notify()
        assert rng.status & NEEDS_RESET


def test_ring_descriptors_rewritten_while_served_never_leave_ram(rig: Rig, rng: Driver) -> None:
    """Another CPU flips a descriptor between a good and a bad address all the time."""
    ring = rng.start(size=16).rings[0]
    good = desc(rng.alloc(64), 64, WRITE)
    bad = [desc(RAM - 1, 64, WRITE), desc(MMIO, 0xFFFFFFFF, WRITE), desc(0, 16, WRITE | NEXT, 99)]
    where = rig.lib.rig_ram(rig.ptr, ring.desc, 16)
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            for d in bad:
                ctypes.memmove(where, d, 16)
                ctypes.memmove(where, good, 16)

    thread = threading.Thread(target=flip)
    thread.start()
    served = broken = 0
    try:
        for _ in range(3000):
            ring.put_avail(0)
            rng.notify()
            served += len(ring.take())
            if rng.status & NEEDS_RESET:
                broken += 1
                ring = rng.start(size=16).rings[0]
    finally:
        stop.set()
        thread.join()
    assert served
    assert served + broken >= 3000


def test_ring_random_garbage_never_crashes_or_hangs(rig: Rig) -> None:
    rand = random.Random(1)
    console_in, console_w = os.pipe()
    os.write(console_w, bytes(1000))
    devices = [(rig.rng(0), 1), (rig.console(console_in, -2, 1), 2), (rig.vsock(2)[1], 3)]
    for turn in range(300):
        for device, queues in devices:
            device.start(queues, size=8, features=F_VERSION_1 | (device.offered & -(turn % 2)))
            for i, ring in enumerate(device.rings):
                addrs = [0x100000, RAM - 4, MMIO, HIGH, ring.desc, ring.used, 0]
                for d in range(8):
                    flags = rand.choice([0, 1, 2, 3, 4, 7])
                    addr = rand.choice(addrs) + rand.choice([0, 0, 1, 16])
                    ring.put_desc(
                        d, addr, rand.choice([0, 1, 44, 64, 4096]), flags, rand.randrange(9)
                    )
                ring.put_avail(*(rand.randrange(8) for _ in range(rand.randrange(9))))
                device.notify(i)
        rig.step()
    for device, queues in devices:
        device.start(queues)
    os.close(console_w)
