"""The memory of a guest at its first instruction, read back as the CPU and Linux would read it."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import pytest
from kernel_files import MIB

from microvm import layout
from microvm.boot.image import BootImage, build_boot_image
from microvm.boot.kernel import ACPI, MMIO_CMDLINE, MPTABLE, NO_MITIGATIONS, Kernel
from microvm.errors import ConfigError

GIB = 1 << 30
TUNED = MPTABLE | MMIO_CMDLINE | NO_MITIGATIONS


def kernel(features: int = TUNED, **changes: Any) -> Kernel:
    values: dict[str, Any] = {
        "path": "vmlinux",
        "version": "6.99",
        "features": features,
        "entry": 16 * MIB,
        "base": 16 * MIB,
        "end": 20 * MIB + 123,
        "initrd_max": layout.RAM_LOW_END - 1,
        "image": "/cache/image",
        "extents": ((0, MIB), (2 * MIB, 8192)),
    }
    return Kernel(**(values | changes))


def build(features: int = TUNED, memory: int = 256 * MIB, **options: Any) -> BootImage:
    return build_boot_image(kernel(features), memory=memory, **options)


class Memory:
    """Guest memory as the data of a boot image fills it."""

    def __init__(self, image: BootImage) -> None:
        self.image = image

    def read(self, gpa: int, size: int) -> bytes:
        for start, data in self.image.data:
            if start <= gpa < start + len(data):
                return data[gpa - start : gpa - start + size].ljust(size, b"\0")
        return bytes(size)

    def unpack(self, form: str, gpa: int) -> tuple[Any, ...]:
        return struct.unpack(form, self.read(gpa, struct.calcsize(form)))

    def walk(self, cr3: int, address: int) -> int | None:
        """Where 4-level paging leads (SDM 3A §4.5), for large pages; None: not present."""
        table = cr3
        for shift in (39, 30, 21):
            (entry,) = self.unpack("<Q", table + 8 * (address >> shift & 511))
            if entry & 3 != 3:
                return None
            table = entry & 0x000F_FFFF_FFFF_F000
            if entry & 0x80:
                assert shift == 21, "1 GiB pages are not everywhere"
                return table | address & 0x1F_FFFF
        raise AssertionError("boot page tables have no 4 KiB pages")


def placed(image: BootImage) -> list[tuple[int, int, str]]:
    """(first, end, what) of everything that is placed."""
    pieces = [(gpa, gpa + len(data), hex(gpa)) for gpa, data in image.data]
    pieces += [(f.gpa, f.gpa + (f.length + 4095 & -4096), f.path) for f in image.files]
    return sorted(pieces)


@pytest.mark.parametrize("features", [TUNED, ACPI])
@pytest.mark.parametrize("memory", [64 * MIB, 256 * MIB, 3 * GIB, 3 * GIB + 4096, 5 * GIB, 1 << 40])
def test_image_pieces_lie_in_ram_and_apart(tmp_path: Path, features: int, memory: int) -> None:
    for name in ("base", "modules"):
        (tmp_path / name).write_bytes(bytes(100_001))
    initrds = (str(tmp_path / "base"), str(tmp_path / "modules"))
    image = build(features, memory, cpus=32, virtio=16, initrds=initrds)
    pieces = placed(image)
    assert len(pieces) == 9
    for (_, end, _), (start, _, _) in itertools.pairwise(pieces):
        assert end <= start
    for start, end, _ in pieces:
        assert any(gpa <= start and end <= gpa + size for gpa, size in image.ram)
        assert end <= layout.EBDA_GPA or start >= layout.EBDA_GPA
    assert sum(size for _, size in image.ram) == memory


def test_image_registers_are_those_of_the_boot_protocol() -> None:
    image = build()
    assert image.rip == 16 * MIB
    assert image.rsi == layout.BOOT_PARAMS_GPA
    null, _, code, data = Memory(image).unpack("<4Q", image.gdt)
    assert null == 0
    # access byte and flags of SDM 3A §3.4.5: present, ring 0, code/data, 4 KiB units; L for code
    assert (code >> 40 & 0xFF, code >> 52 & 0xF) == (0x9B, 0xA)
    assert (data >> 40 & 0xFF, data >> 52 & 0xF) == (0x93, 0xC)


def test_page_tables_map_the_first_gib_one_to_one() -> None:
    image = build()
    memory = Memory(image)
    for address in (0, 0x7123, 16 * MIB, GIB - 1):
        assert memory.walk(image.cr3, address) == address
    assert memory.walk(image.cr3, GIB) is None
    assert memory.walk(image.cr3, 1 << 39) is None


def test_page_tables_map_all_of_a_kernel_that_lies_high() -> None:
    high = kernel(base=2 * GIB + 16 * MIB, entry=2 * GIB + 16 * MIB, end=2 * GIB + 64 * MIB)
    image = build_boot_image(high, memory=3 * GIB)
    assert Memory(image).walk(image.cr3, high.end - 1) == high.end - 1
    assert max(gpa + len(data) for gpa, data in image.data if gpa < 0x20000) <= layout.CMDLINE_GPA


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (64 * MIB, [(MIB, 63 * MIB, 1)]),
        (3 * GIB, [(MIB, 3 * GIB - MIB, 1)]),
        (5 * GIB, [(MIB, 3 * GIB - MIB, 1), (4 * GIB, 2 * GIB, 1)]),
    ],
)
def test_e820_describes_ram_around_the_hole(memory: int, expected: list[Any]) -> None:
    image = build(memory=memory)
    assert list(image.e820[:2]) == [(0, 0x9FC00, 1), (0x9FC00, 0x400, 2)]
    assert list(image.e820[2:]) == expected


def test_boot_params_hold_map_command_line_and_initrd(tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(bytes(10_000))
    image = build(memory=5 * GIB, initrds=(str(tmp_path / "initrd"),))
    memory, base = Memory(image), image.rsi
    assert memory.unpack("<H", base + 0x1FE) == (0xAA55,)
    assert memory.read(base + 0x202, 4) == b"HdrS"
    assert memory.read(base + 0x1EF, 1) == b"\0", "the sentinel must be 0"
    assert memory.unpack("<BB", base + 0x210) == (0xFF, 1)
    (count,) = memory.read(base + 0x1E8, 1)
    entries = [memory.unpack("<QQI", base + 0x2D0 + 20 * i) for i in range(count)]
    assert tuple(entries) == image.e820
    assert memory.unpack("<I", base + 0x1E0) == ((3 * GIB - MIB) >> 10,)
    (cmdline,) = memory.unpack("<I", base + 0x228)
    assert memory.read(cmdline, 2048).split(b"\0")[0].decode() == image.cmdline
    start, size = memory.unpack("<II", base + 0x218)
    assert (start, size) == (3 * GIB - 12288, 10_000)
    assert [(f.gpa, f.length) for f in image.files][-1] == (start, size)


# ---- initrd ------------------------------------------------------------------------------------


def test_initrds_follow_each_other_on_pages_of_their_own(tmp_path: Path) -> None:
    for name, size in (("a", 5000), ("b", 0), ("c", 4096), ("d", 1)):
        (tmp_path / name).write_bytes(bytes(size))
    image = build(initrds=[str(tmp_path / name) for name in "abcd"])
    top = 256 * MIB
    files = [(f.gpa, f.length) for f in image.files[2:]]
    assert files == [(top - 16384, 5000), (top - 8192, 4096), (top - 4096, 1)]
    assert Memory(image).unpack("<II", image.rsi + 0x218) == (top - 16384, 12289)


def test_initrd_stays_under_what_the_kernel_reaches(tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(bytes(4096))
    image = build_boot_image(
        kernel(initrd_max=0x37FFFFFF), memory=2 * GIB, initrds=[str(tmp_path / "initrd")]
    )
    assert image.files[-1].gpa == 0x38000000 - 4096


def test_initrd_that_is_too_big_says_so(tmp_path: Path) -> None:
    with open(tmp_path / "initrd", "wb") as file:
        file.truncate(236 * MIB)
    path = str(tmp_path / "initrd")
    with pytest.raises(ConfigError, match=f"{path}: initrd of 236 MiB does not fit .* more memory"):
        build(initrds=(path,))
    assert build(memory=257 * MIB, initrds=(path,)).files[-1].length == 236 * MIB


def test_initrd_that_is_missing_or_no_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: cannot open initrd: No such file"):
        build(initrds=(str(tmp_path / "none"),))
    with pytest.raises(ConfigError, match="initrd is not a regular file"):
        build(initrds=(str(tmp_path),))


# ---- machines that cannot be -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 63 * MIB}, "64 MiB to 1024 GiB are possible"),
        ({"memory": (1 << 40) + 4096}, "64 MiB to 1024 GiB are possible"),
        ({"memory": 64 * MIB + 1}, "not a multiple of 4096"),
        ({"cpus": 0}, "1 to 32 are possible"),
        ({"cpus": 33}, "1 to 32 are possible"),
        ({"virtio": 17}, "at most 16 are possible"),
        ({"extra": "x" * 2048}, "kernel command line is 2[0-9]+ bytes: at most 2047 fit"),
        ({"cmdline_text": "a\nb"}, "NUL or a line end"),
        ({"cmdline_text": "a\0b"}, "NUL or a line end"),
    ],
)
def test_machine_that_cannot_be_gets_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**({"memory": 256 * MIB} | options))


def test_kernel_larger_than_ram_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="needs RAM up to 100 MiB, the guest has 64 MiB"):
        build_boot_image(kernel(end=100 * MIB), memory=64 * MIB)


# ---- command line ------------------------------------------------------------------------------


def test_cmdline_of_a_tuned_kernel_names_its_devices() -> None:
    words = build(virtio=2).cmdline.split()
    assert words[-2:] == [
        "virtio_mmio.device=4K@0xd0000000:5",
        "virtio_mmio.device=4K@0xd0001000:6",
    ]
    assert "quiet" in words
    assert "mitigations=off" not in words
    assert "acpi=off" not in words


def test_cmdline_of_a_stock_kernel_names_none_and_turns_mitigations_off() -> None:
    words = build(ACPI, virtio=2).cmdline.split()
    assert not [word for word in words if word.startswith("virtio_mmio")]
    assert "mitigations=off" in words


def test_cmdline_of_a_kernel_with_both_ways_turns_acpi_off() -> None:
    assert "acpi=off" in build(TUNED | ACPI).cmdline.split()


def test_cmdline_extra_comes_last_and_verbose_is_not_quiet() -> None:
    words = build(extra="debug", verbose=True).cmdline.split()
    assert words[-1] == "debug"
    assert "quiet" not in words
    assert build(cmdline_text="only this").cmdline == "only this"
    assert build(cmdline_text="", extra="x").cmdline == "x"


# ---- MP table (MultiProcessor Specification 1.4) -----------------------------------------------


@pytest.mark.parametrize(("cpus", "virtio"), [(1, 0), (2, 3), (32, 16)])
def test_mp_table_names_cpus_and_lines(cpus: int, virtio: int) -> None:
    memory = Memory(build(cpus=cpus, virtio=virtio))
    pointer = memory.read(layout.EBDA_GPA, 16)
    assert pointer[:4] == b"_MP_" and sum(pointer) & 0xFF == 0
    (table_at,) = struct.unpack_from("<I", pointer, 4)
    (length,) = memory.unpack("<H", table_at + 4)
    table = memory.read(table_at, length)
    assert table[:4] == b"PCMP" and sum(table) & 0xFF == 0
    assert table_at + length <= 0xA0000, "Linux looks at the last KiB of low memory only"
    assert struct.unpack_from("<I", table, 36) == (layout.LAPIC_GPA,)
    entries, at = [], 44
    for _ in range(struct.unpack_from("<H", table, 34)[0]):
        size = 20 if table[at] == 0 else 8
        entries.append(table[at : at + size])
        at += size
    assert at == length
    found = [(e[1], e[3]) for e in entries if e[0] == 0]
    assert found == [(cpu, 3 if cpu == 0 else 1) for cpu in range(cpus)]
    (ioapic,) = [e for e in entries if e[0] == 2]
    assert struct.unpack_from("<I", ioapic, 4) == (layout.IOAPIC_GPA,)
    assert ioapic[1] >= cpus
    pins = {e[5]: e[7] for e in entries if e[0] == 3}
    expected = {gsi: gsi for gsi in (layout.GSI_SERIAL, *range(5, 5 + virtio))}
    assert pins == {0: 2} | expected
    assert all(e[6] == ioapic[1] for e in entries if e[0] == 3)


# ---- ACPI 6.4 ----------------------------------------------------------------------------------


class Acpi:
    """Follows the tables from the RSDP, checking every checksum and length on the way."""

    def __init__(self, image: BootImage) -> None:
        self.memory = Memory(image)
        (rsdp_at,) = self.memory.unpack("<Q", image.rsi + 0x70)
        rsdp = self.memory.read(rsdp_at, 36)
        assert rsdp[:8] == b"RSD PTR " and rsdp[15] == 2
        assert sum(rsdp[:20]) & 0xFF == 0 and sum(rsdp) & 0xFF == 0
        xsdt = self.table(struct.unpack_from("<Q", rsdp, 24)[0])
        pointers = [at for (at,) in struct.iter_unpack("<Q", xsdt[36:])]
        self.tables = {table[:4]: table for table in map(self.table, pointers)}

    def table(self, at: int) -> bytes:
        (length,) = self.memory.unpack("<I", at + 4)
        table = self.memory.read(at, length)
        assert sum(table) & 0xFF == 0, table[:4]
        assert at >= layout.ACPI_GPA and at + length <= layout.HIGH_RAM_GPA
        return table


def test_acpi_is_there_only_for_kernels_that_need_it() -> None:
    assert Memory(build()).unpack("<Q", layout.BOOT_PARAMS_GPA + 0x70) == (0,)
    assert (layout.ACPI_GPA, 0x20000, 3) in build(ACPI).e820


def test_acpi_fadt_is_hardware_reduced_and_resets_by_port() -> None:
    fadt = Acpi(build(ACPI)).tables[b"FACP"]
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 20 and flags & 1 << 10
    assert struct.unpack_from("<BBxxQB", fadt, 116) == (1, 8, layout.PORT_RESET, 0xFE)
    assert struct.unpack_from("<I", fadt, 40)[0] == struct.unpack_from("<Q", fadt, 140)[0]


def test_acpi_madt_names_cpus_and_ioapic() -> None:
    madt = Acpi(build(ACPI, cpus=3)).tables[b"APIC"]
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert [(e[3], e[4]) for e in entries if e[0] == 0] == [(0, 1), (1, 1), (2, 1)]
    assert [struct.unpack_from("<I", e, 4)[0] for e in entries if e[0] == 1] == [layout.IOAPIC_GPA]


def package(data: bytes, at: int) -> tuple[int, int]:
    """Start of the contents and end of an AML package (ACPI 6.4 §20.2.4)."""
    lead = data[at]
    extra = lead >> 6
    if not extra:
        return at + 1, at + lead
    size = lead & 0xF
    for i in range(extra):
        size |= data[at + 1 + i] << (4 + 8 * i)
    return at + 1 + extra, at + size


@pytest.mark.parametrize("virtio", [0, 1, 16])
def test_acpi_dsdt_describes_each_device(virtio: int) -> None:
    acpi = Acpi(build(ACPI, virtio=virtio))
    dsdt = acpi.table(struct.unpack_from("<Q", acpi.tables[b"FACP"], 140)[0])
    assert dsdt[36] == 0x10  # ScopeOp
    start, end = package(dsdt, 37)
    assert end == len(dsdt)
    assert dsdt[start : start + 5] == b"\\_SB_"
    at, devices = start + 5, []
    while at < end:
        assert dsdt[at : at + 2] == b"\x5b\x82"  # DeviceOp
        first, last = package(dsdt, at + 2)
        devices.append(dsdt[first:last])
        at = last
    assert len(devices) == 1 + virtio
    assert b"\x08_HID\x0c\x41\xd0\x05\x01" in devices[0]  # EisaId("PNP0501")
    for i, device in enumerate(devices[1:]):
        assert device[:4] == b"V%03d" % i
        assert b"\x08_HID\x0dLNRO0005\0" in device
        assert struct.pack("<BHBII", 0x86, 9, 1, layout.VIRTIO_MMIO_GPA + i * 4096, 4096) in device
        assert struct.pack("<BHBBI", 0x89, 6, 3, 1, layout.GSI_VIRTIO + i) in device
        crs, crs_end = package(device, device.index(b"_CRS") + 5)
        assert crs_end == len(device)
        assert device[crs] == 0x0A and device[crs + 1] == crs_end - crs - 2
        assert device.endswith(b"\x79\0")  # end tag
