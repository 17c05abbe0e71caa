"""Guest memory, the bus, the loop, the serial port and the PC's single ports.

python -m pytest tests/unit/test_devices.py
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import Rig

SERIAL, GSI = 0x3F8, 4
DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
MIB = 1 << 20


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(ram=4 * MIB) as rig:
        yield rig


# ---- memory -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpa", "size", "error"),
    [
        (4 * MIB, 4096, 0),
        (1 << 32, 8 * MIB, 0),
        (0, 4096, errno.EINVAL),
        (4 * MIB - 4096, 8192, errno.EINVAL),
        (8 * MIB, 0, errno.EINVAL),
        (8 * MIB, 100, errno.EINVAL),
        (8 * MIB + 1, 4096, errno.EINVAL),
        (0xFFFFFFFFFFFFF000, 8192, errno.EINVAL),
        (1 << 40, 1 << 62, errno.ENOMEM),
    ],
)
def test_mem_add_checks_its_range(rig: Rig, gpa: int, size: int, error: int) -> None:
    assert rig.add_ram(gpa, size) == -error


def test_mem_add_beyond_the_last_slot_is_refused(rig: Rig) -> None:
    results = [rig.add_ram((8 + 2 * i) * MIB, 4096) for i in range(16)]
    assert results == [0] * 15 + [-errno.ENOSPC]


@pytest.mark.parametrize(
    ("gpa", "size", "inside"),
    [
        (0, 4 * MIB, True),
        (4 * MIB - 1, 1, True),
        (4 * MIB, 0, False),
        (4 * MIB - 1, 2, False),
        (0, 4 * MIB + 1, False),
        (1, 0xFFFFFFFFFFFFFFFF, False),
        (0xFFFFFFFFFFFFFFFF, 2, False),
        (0, 0, True),
    ],
)
def test_mem_ptr_only_wholly_inside_a_slot(rig: Rig, gpa: int, size: int, inside: bool) -> None:
    assert bool(rig.lib.rig_ram(rig.ptr, gpa, size)) == inside


def test_mem_ptr_across_adjacent_slots_is_refused(rig: Rig) -> None:
    assert rig.add_ram(4 * MIB, MIB) == 0
    assert not rig.lib.rig_ram(rig.ptr, 4 * MIB - 1, 2)


def test_mem_map_file_is_copy_on_write(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(b"A" * 5000)
    fd = os.open(path, os.O_RDONLY)
    assert rig.lib.rig_map_file(rig.ptr, 0x1000, fd, 0, 5000) == 0
    os.close(fd)
    assert rig.load(0x1000, 5001) == b"A" * 5000 + b"\0"
    rig.store(0x1000, b"B")
    assert path.read_bytes() == b"A" * 5000
    assert rig.written() == [(0x1000, 8192)]


@pytest.mark.parametrize(
    ("gpa", "off", "size", "error"),
    [
        (0x1001, 0, 4096, errno.EINVAL),
        (0x1000, 1, 4096, errno.EINVAL),
        (0x1000, 0, 0, errno.EINVAL),
        (0x1000, 0, 8193, errno.EINVAL),
        (0x1000, 8192, 1, errno.EINVAL),
        (0x1000, 0, 0xFFFFFFFFFFFFFFFF, errno.EINVAL),
        (4 * MIB - 4096, 0, 8192, errno.EFAULT),
        (1 << 40, 0, 4096, errno.EFAULT),
    ],
)
def test_mem_map_file_checks_its_range(
    rig: Rig, tmp_path: Path, gpa: int, off: int, size: int, error: int
) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDONLY)
    assert rig.lib.rig_map_file(rig.ptr, gpa, fd, off, size) == -error
    os.close(fd)


# ---- bus ----------------------------------------------------------------------------


def test_bus_finds_the_region_and_its_offset(rig: Rig) -> None:
    for name, base, size in ((1, 0x1000, 0x10), (2, 0x1010, 0x10), (3, 0x500, 4)):
        assert rig.lib.rig_bus_add(rig.ptr, base, size, name) == 0
    assert rig.read(0x1000, 1) == 0x01
    assert rig.read(0x1004, 8) == 1 << 32 | 4 << 8 | 8
    assert rig.read(0x101F, 1) & 0xFF == 1
    assert rig.read(0x1010, 8) == 2 << 32 | 8
    assert rig.read(0x500, 4) == 4


@pytest.mark.parametrize("addr", [0x4FF, 0x501, 0x504, 0xFFFFFFFFFFFFFFFF, 0])
def test_bus_unclaimed_or_straddling_reads_all_ones(rig: Rig, addr: int) -> None:
    rig.lib.rig_bus_add(rig.ptr, 0x500, 4, 1)
    assert rig.read(addr, 4) == 0xFFFFFFFF
    rig.write(addr, 0, 4)


@pytest.mark.parametrize(
    ("base", "size", "error"),
    [
        (0x500, 4, errno.EEXIST),
        (0x4FF, 2, errno.EEXIST),
        (0x503, 1, errno.EEXIST),
        (0x400, 0x1000, errno.EEXIST),
        (0x504, 4, 0),
        (0x4FF, 1, 0),
        (0x600, 0, errno.EINVAL),
        (0xFFFFFFFFFFFFFFFF, 2, errno.EINVAL),
    ],
)
def test_bus_add_checks_its_range(rig: Rig, base: int, size: int, error: int) -> None:
    assert rig.lib.rig_bus_add(rig.ptr, 0x500, 4, 1) == 0
    assert rig.lib.rig_bus_add(rig.ptr, base, size, 2) == -error


def test_bus_full_is_refused(rig: Rig) -> None:
    results = [rig.lib.rig_bus_add(rig.ptr, i * 16, 16, 1) for i in range(65)]
    assert results == [0] * 64 + [-errno.ENOSPC]


# ---- serial ---------------------------------------------------------------------------


class Uart:
    """Registers by number."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

    def __getitem__(self, reg: int) -> int:
        return self.rig.inp(SERIAL + reg)

    def __setitem__(self, reg: int, value: int) -> None:
        self.rig.out(SERIAL + reg, value)


@pytest.fixture
def uart(rig: Rig) -> Uart:
    rig.serial()
    return Uart(rig)


def test_serial_output_reaches_sink(rig: Rig, uart: Uart) -> None:
    for byte in b"Linux\n":
        assert uart[LSR] == 0x60
        uart[DATA] = byte
    assert rig.sink() == b"Linux\n"


def test_serial_wide_access_is_split_into_bytes(rig: Rig, uart: Uart) -> None:
    rig.out(SERIAL, 0x0041, 2)  # THR, IER
    assert rig.sink() == b"A"
    assert rig.inp(SERIAL + LSR, 2) == 0xB060


def test_serial_probe_as_linux_does_finds_16550a(uart: Uart) -> None:
    """serial8250 autoconfig: IER sticks, loopback answers, the FIFO is there."""
    uart[IER] = 0
    assert uart[IER] == 0
    uart[IER] = 0x0F
    assert uart[IER] == 0x0F
    uart[IER] = 0
    uart[MCR] = 0x10 | 0x0A
    assert uart[MSR] & 0xF0 == 0x90
    uart[MCR] = 0
    uart[FCR] = 1
    assert uart[IIR] >> 6 == 3
    uart[SCR] = 0x5A
    assert uart[SCR] == 0x5A


def test_serial_divisor_latch_hides_data_and_ier(rig: Rig, uart: Uart) -> None:
    uart[LCR] = 0x83
    uart[DATA], uart[IER] = 12, 1
    assert (uart[DATA], uart[IER]) == (12, 1)
    uart[LCR] = 0x03
    assert uart[IER] == 0
    assert rig.sink() == b""


def test_serial_thre_interrupt_comes_with_enable_and_goes_with_iir(rig: Rig, uart: Uart) -> None:
    """serial8250_do_startup looks for exactly this, twice."""
    for _ in range(2):
        uart[IER] = 2
        assert rig.level(GSI) == 1
        assert uart[IIR] & 0x0F == 2
        assert rig.level(GSI) == 0
        assert uart[IIR] & 0x0F == 1
        uart[IER] = 0


def test_serial_thre_interrupt_comes_after_each_byte(rig: Rig, uart: Uart) -> None:
    uart[IER] = 2
    assert uart[IIR] & 0x0F == 2
    edges = rig.edges(GSI)
    uart[DATA] = 0x41
    assert rig.edges(GSI) == edges + 1


def test_serial_input_interrupts_until_read(rig: Rig) -> None:
    serial, uart = rig.serial(), Uart(rig)
    uart[IER] = 1
    assert rig.lib.mv_serial_input(serial, b"ab", 2) == 2
    assert rig.level(GSI) == 1
    assert uart[IIR] & 0x0F == 4
    assert uart[LSR] & 1
    assert (uart[DATA], uart[DATA]) == (0x61, 0x62)
    assert rig.level(GSI) == 0
    assert not uart[LSR] & 1
    assert uart[DATA] == 0


def test_serial_input_beyond_fifo_is_left_with_sender(rig: Rig) -> None:
    serial = rig.serial()
    assert rig.lib.mv_serial_input(serial, bytes(300), 300) == 256


def test_serial_input_from_descriptor_all_arrives_in_order(rig: Rig) -> None:
    data = os.urandom(3000)
    r, w = os.pipe()
    rig.serial(r)
    uart = Uart(rig)
    os.write(w, data)
    got = bytearray()

    def take() -> bool:
        while uart[LSR] & 1:
            got.append(uart[DATA])
        return len(got) == len(data)

    rig.until(take)
    assert bytes(got) == data
    os.close(w)


def test_serial_loopback_returns_what_was_sent(rig: Rig, uart: Uart) -> None:
    uart[MCR] = 0x10
    uart[DATA] = 0x55
    assert uart[DATA] == 0x55
    assert rig.sink() == b""


# ---- single ports ----------------------------------------------------------------------


def test_debug_exit_status_is_as_in_qemu(rig: Rig) -> None:
    assert rig.lib.rig_pc_ports(rig.ptr) == 0
    for value, status in ((0, 1), (0x10, 33), (0x7F, 255)):
        rig.out(0xF4, value, 4)
        assert rig.lib.rig_debug_exit(rig.ptr) == status


def test_reset_port_takes_only_the_pulse_command(rig: Rig) -> None:
    rig.lib.rig_pc_ports(rig.ptr)
    rig.out(0x64, 0xAA)
    assert rig.lib.rig_resets(rig.ptr) == 0
    assert not rig.inp(0x64) & 2, "Linux waits for this before it resets"
    rig.out(0x64, 0xFE)
    assert rig.lib.rig_resets(rig.ptr) == 1


def test_event_port_takes_only_whole_words(rig: Rig) -> None:
    rig.lib.rig_pc_ports(rig.ptr)
    rig.out(0x600, 0x12, 1)
    rig.out(0x602, 0x12, 2)
    assert rig.lib.rig_event(rig.ptr) == 0
    rig.out(0x600, 0x704, 4)
    assert rig.lib.rig_event(rig.ptr) == 0x704


def test_cmos_clock_is_the_hosts_in_utc(rig: Rig) -> None:
    rig.lib.rig_pc_ports(rig.ptr)

    def cmos(index: int) -> int:
        rig.out(0x70, index)
        return rig.inp(0x71)

    def bcd(value: int) -> int:
        return (value >> 4) * 10 + (value & 15)

    assert cmos(0x0A) & 0x80 == 0, "no update is ever in progress"
    assert cmos(0x0B) == 0x02
    assert cmos(0x0D) == 0x80
    now = time.gmtime()
    fields = [bcd(cmos(index)) for index in (0x32, 0x09, 0x08, 0x07, 0x04, 0x02)]
    expected = [now.tm_year // 100, now.tm_year % 100, *now[1:5]]
    again = time.gmtime()
    assert fields in (expected, [again.tm_year // 100, again.tm_year % 100, *again[1:5]])
