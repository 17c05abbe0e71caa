"""The virtio-mmio transport and the split queue, as a well-behaved driver uses them.

python -m pytest tests/unit/test_virtio_transport.py
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from tests.rig import (
    ACKNOWLEDGE,
    CONFIG,
    CONFIG_GENERATION,
    DEVICE_FEATURES_SEL,
    DEVICE_ID,
    DRIVER,
    F_EVENT_IDX,
    F_INDIRECT,
    F_VERSION_1,
    INDIRECT,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    MAGIC,
    NEXT,
    QUEUE_READY,
    QUEUE_SEL,
    QUEUE_SIZE_MAX,
    RUNNING,
    STATUS,
    VERSION,
    WRITE,
    Buf,
    Driver,
    Rig,
)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


@pytest.fixture
def rng(rig: Rig) -> Driver:
    return rig.rng()


def test_identity_registers_are_those_of_version_2(rng: Driver) -> None:
    assert rng.r(MAGIC) == 0x74726976
    assert rng.r(VERSION) == 2
    assert rng.r(DEVICE_ID) == 4


def test_features_offer_version_1_event_idx_and_indirect(rng: Driver) -> None:
    assert rng.offered == F_VERSION_1 | F_EVENT_IDX | F_INDIRECT
    rng.w(DEVICE_FEATURES_SEL, 2)
    assert rng.r(0x10) == 0


def test_queue_registers_of_absent_queue_read_zero(rng: Driver) -> None:
    assert rng.r(QUEUE_SIZE_MAX) == 256
    rng.w(QUEUE_SEL, 1)
    assert rng.r(QUEUE_SIZE_MAX) == 0
    assert rng.r(QUEUE_READY) == 0


def test_shared_memory_registers_say_there_is_none(rng: Driver) -> None:
    assert [rng.r(reg) for reg in (0xB0, 0xB4, 0xB8, 0xBC)] == [0xFFFFFFFF] * 4


def test_request_completes_and_reports_all_bytes_written(rig: Rig, rng: Driver) -> None:
    rng.start()
    data, size = rng.request(100)
    assert size == 100
    assert data != bytes(100)
    ring = rng.rings[0]
    assert (0x100000, 100) in rig.written()
    assert ring.used_idx == 1


def test_request_of_several_buffers_fills_them_in_order(rng: Driver) -> None:
    data, size = rng.start().request(10, 0x1000, 7)
    assert size == 0x1011
    assert all(data[at : at + 7] != bytes(7) for at in (0, 10, 0x100A))


def test_reset_returns_all_to_power_on(rig: Rig, rng: Driver) -> None:
    rng.start().request(8)
    assert rig.level(rng.gsi) == 1
    rng.w(STATUS, 0)
    assert rng.status == 0
    assert rng.r(INTERRUPT_STATUS) == 0
    assert rig.level(rng.gsi) == 0
    assert rng.r(QUEUE_READY) == 0
    assert rng.start().request(8)[1] == 8


def test_interrupt_line_is_high_until_acknowledged(rig: Rig, rng: Driver) -> None:
    rng.start().request(8)
    assert (rig.level(rng.gsi), rng.r(INTERRUPT_STATUS)) == (1, 1)
    rng.w(INTERRUPT_ACK, 1)
    assert (rig.level(rng.gsi), rng.r(INTERRUPT_STATUS)) == (0, 0)


def test_interrupt_acknowledged_in_part_gives_another_edge(rig: Rig) -> None:
    console = rig.console().start(queues=2)
    console.request(b"x", queue=1)
    rig.lib.mv_console_resize(console.device, 100, 40)
    assert console.r(INTERRUPT_STATUS) == 3
    edges = rig.edges(console.gsi)
    console.w(INTERRUPT_ACK, 1)
    assert rig.edges(console.gsi) == edges + 1
    assert rig.level(console.gsi) == 1
    console.w(INTERRUPT_ACK, 2)
    assert rig.level(console.gsi) == 0


def test_no_interrupt_flag_suppresses_without_event_idx(rig: Rig, rng: Driver) -> None:
    rng.start(features=F_VERSION_1)
    rig.store(rng.rings[0].avail, b"\x01\x00")
    rng.request(8)
    assert rng.r(INTERRUPT_STATUS) == 0
    rig.store(rng.rings[0].avail, b"\x00\x00")
    rng.request(8)
    assert rng.r(INTERRUPT_STATUS) == 1


def test_used_event_ahead_suppresses_until_passed(rng: Driver) -> None:
    ring = rng.start().rings[0]
    ring.set_used_event(2)
    rng.request(8)
    rng.request(8)
    assert rng.r(INTERRUPT_STATUS) == 0
    rng.request(8)
    assert rng.r(INTERRUPT_STATUS) == 1


def test_avail_event_asks_for_the_next_buffer(rng: Driver) -> None:
    ring = rng.start().rings[0]
    for want in (1, 2, 3):
        rng.request(8)
        assert ring.avail_event == want


def test_indices_wrap_at_65536(rng: Driver) -> None:
    ring = rng.start(size=2).rings[0]
    gpa = rng.alloc(8)
    done = 0
    for _ in range(65536 + 3):
        ring.add([Buf(gpa, 1, True)])
        rng.notify()
        done += len(ring.take())
    assert done == 65536 + 3
    assert ring.used_idx == 3
    assert rng.status == RUNNING


def test_indirect_table_is_followed(rig: Rig, rng: Driver) -> None:
    ring = rng.start().rings[0]
    a, b, table = rng.alloc(16), rng.alloc(16), rng.alloc(32)
    ring.put_desc(0, table, 32, INDIRECT)
    rig.store(table, _desc(a, 16, WRITE | NEXT, 1) + _desc(b, 16, WRITE, 0))
    ring.put_avail(0)
    rng.notify()
    assert ring.take() == [(0, 32)]
    assert rig.load(a, 16) != bytes(16) != rig.load(b, 16)


def test_indirect_table_after_direct_descriptor_is_followed(rig: Rig, rng: Driver) -> None:
    ring = rng.start().rings[0]
    a, b, table = rng.alloc(16), rng.alloc(16), rng.alloc(24)
    ring.put_desc(3, a, 16, WRITE | NEXT, 5)
    ring.put_desc(5, table + 5, 16, INDIRECT)
    rig.store(table + 5, _desc(b, 16, WRITE, 0))  # at an odd address: no rule against it
    ring.put_avail(3)
    rng.notify()
    assert ring.take() == [(3, 32)]


def test_buffer_ending_exactly_at_end_of_ram_is_legal(rig: Rig, rng: Driver) -> None:
    ring = rng.start().rings[0]
    ring.add([Buf(rig.ram_end - 64, 64, True)])
    rng.notify()
    assert ring.take() == [(0, 64)]
    assert rng.status == RUNNING


def test_rings_ending_exactly_at_end_of_ram_are_legal(rig: Rig, rng: Driver) -> None:
    assert rng.negotiate()
    assert rng.set_queue(0, 4, 0x1000, 0x2000, rig.ram_end - (4 + 8 * 4 + 2) & ~3)
    rng.w(STATUS, 0)
    assert rng.negotiate()
    assert rng.set_queue(0, 4, rig.ram_end - 64, 0x2000, 0x3000)


def test_zero_length_buffer_is_legal_and_empty(rng: Driver) -> None:
    ring = rng.start().rings[0]
    gpa = rng.alloc(8)
    ring.add([Buf(0xFFFFFFFFFFFFFFFF, 0, True), Buf(gpa, 8, True)])
    rng.notify()
    assert ring.take() == [(0, 8)]


def test_config_space_takes_widths_1_2_4_8(rig: Rig) -> None:
    _, vsock = rig.vsock()
    assert vsock.r(CONFIG, 8) == 3
    assert vsock.r(CONFIG, 4) == 3
    assert vsock.r(CONFIG, 2) == 3
    assert vsock.r(CONFIG, 1) == 3
    assert vsock.r(CONFIG + 4, 4) == 0
    console = rig.console(slot=1)
    assert console.r(CONFIG, 8) == 80 | 25 << 16 | 1 << 32
    assert console.r(CONFIG + 2, 2) == 25


def test_config_change_bumps_generation_and_interrupts(rig: Rig) -> None:
    console = rig.console().start(queues=2)
    generation = console.r(CONFIG_GENERATION)
    rig.lib.mv_console_resize(console.device, 132, 50)
    assert console.r(CONFIG_GENERATION) != generation
    assert console.r(INTERRUPT_STATUS) == 2
    assert console.r(CONFIG, 4) == 132 | 50 << 16


def test_config_change_before_driver_ok_does_not_interrupt(rig: Rig) -> None:
    console = rig.console()
    console.w(STATUS, ACKNOWLEDGE | DRIVER)
    rig.lib.mv_console_resize(console.device, 132, 50)
    assert console.r(INTERRUPT_STATUS) == 0


def test_notify_through_eventfd_is_served_by_the_loop(rig: Rig, rng: Driver) -> None:
    fd = rig.lib.rig_notify_fd(rig.ptr, rng.device)
    ring = rng.start().rings[0]
    ring.add([Buf(rng.alloc(8), 8, True)])
    os.eventfd_write(fd, 1)
    rig.until(ring.take)


def _desc(addr: int, size: int, flags: int, next_: int) -> bytes:
    return struct.pack("<QIHH", addr, size, flags, next_)
