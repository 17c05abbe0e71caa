"""The least ACPI that a stock kernel needs to find CPUs, the IOAPIC and virtio devices.

ACPI 6.4, hardware-reduced (§4.1): no PM timer, no SCI, no fixed registers. Five tables:
RSDP -> XSDT -> FADT -> DSDT, and XSDT -> MADT. Debian's cloud kernels parse no MP tables and take
no devices from the command line, so for them this is the only way.
"""

from __future__ import annotations

from struct import pack, pack_into

from microvm import layout

_OEM = b"MVBOOT"
_OEM_TABLE = b"MICROVM "
_CREATOR = b"MICR"

# FADT (§5.2.9)
_FADT_SIZE = 276
_FLAGS = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20  # WBINVD, no buttons, RESET_REG, HW_REDUCED
_BOOT_FLAGS = 1 << 2 | 1 << 4 | 1 << 5  # no VGA, no ASPM, no CMOS clock; and no i8042
_RESET_VALUE = 0xFE

# Large resource descriptors (§6.4.3)
_EDGE_HIGH_CONSUMER = 0x03


def acpi_tables(cpus: int, virtio: int) -> bytes:
    """All tables, for ACPI_GPA, the RSDP first. ``virtio`` is the number of virtio devices."""
    base = layout.ACPI_GPA
    dsdt = _table(b"DSDT", 2, _aml(virtio))
    madt = _table(b"APIC", 4, _madt(cpus))
    offsets, blob = [], bytearray(64)  # the RSDP and some room
    for table in (dsdt, _table(b"FACP", 6, _fadt(base + 64)), madt):
        offsets.append(base + len(blob))
        blob += table + bytes(-len(table) % 16)
    xsdt = base + len(blob)
    blob += _table(b"XSDT", 1, pack("<QQ", *offsets[1:]))
    blob[:36] = _rsdp(xsdt)
    return bytes(blob)


def _sum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _rsdp(xsdt: int) -> bytes:
    """§5.2.5.3."""
    rsdp = bytearray(pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, 36, xsdt, 0))
    rsdp[8] = _sum(rsdp[:20])
    rsdp[32] = _sum(rsdp)
    return bytes(rsdp)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header (§5.2.6)."""
    header = (signature, 36 + len(body), revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1)
    table = bytearray(pack("<4sIBB6s8sI4sI", *header) + body)
    table[9] = _sum(table)
    return bytes(table)


def _fadt(dsdt: int) -> bytes:
    fadt = bytearray(_FADT_SIZE)
    pack_into("<I", fadt, 40, dsdt)
    pack_into("<H", fadt, 109, _BOOT_FLAGS)
    pack_into("<I", fadt, 112, _FLAGS)
    # RESET_REG: a generic address (§5.2.3.2) in I/O space, 8 bits, byte access
    pack_into("<BBBBQB", fadt, 116, 1, 8, 0, 1, layout.PORT_RESET, _RESET_VALUE)
    fadt[131] = 4  # minor version
    pack_into("<Q", fadt, 140, dsdt)
    pack_into("<8s", fadt, 268, b"MICROVM\0")  # hypervisor vendor
    return bytes(fadt[36:])


def _madt(cpus: int) -> bytes:
    """§5.2.12: local APICs, the IOAPIC, NMI on LINT1 of all."""
    parts = [pack("<II", layout.LAPIC_GPA, 0)]
    parts += (pack("<BBBBI", 0, 8, cpu, cpu, 1) for cpu in range(cpus))
    parts.append(pack("<BBBxII", 1, 12, cpus, layout.IOAPIC_GPA, 0))
    parts.append(pack("<BBBHB", 4, 6, 0xFF, 0, 1))
    return b"".join(parts)


def _aml(virtio: int) -> bytes:
    """Scope (\\_SB) with a device for the serial port and one for each virtio device (§20)."""
    ports = _io(layout.PORT_SERIAL, 8)
    devices = [_device(b"COM1", _eisa_id("PNP0501"), 0, ports, layout.GSI_SERIAL)]
    for i in range(virtio):
        memory = _memory(layout.VIRTIO_MMIO_GPA + i * layout.VIRTIO_MMIO_STRIDE)
        name = b"V%03d" % i
        devices.append(_device(name, b"\x0dLNRO0005\0", i, memory, layout.GSI_VIRTIO + i))
    return b"\x10" + _package(b"\\_SB_" + b"".join(devices))


def _device(name: bytes, hid: bytes, uid: int, resource: bytes, gsi: int) -> bytes:
    resources = resource + pack("<BHBBI", 0x89, 6, _EDGE_HIGH_CONSUMER, 1, gsi) + b"\x79\0"
    buffer = b"\x11" + _package(b"\x0a" + bytes((len(resources),)) + resources)
    body = name + b"\x08_HID" + hid + b"\x08_UID\x0a" + bytes((uid,)) + b"\x08_CRS" + buffer
    return b"\x5b\x82" + _package(body)


def _io(port: int, length: int) -> bytes:
    """I/O port descriptor (§6.4.2.5), 16-bit decode."""
    return pack("<BBHHBB", 0x47, 1, port, port, 1, length)


def _memory(gpa: int) -> bytes:
    """32-bit fixed memory range (§6.4.3.4), read-write."""
    return pack("<BHBII", 0x86, 9, 1, gpa, layout.VIRTIO_MMIO_STRIDE)


def _eisa_id(name: str) -> bytes:
    """A DWord constant: three letters in 5 bits each, four hex digits, big endian (§19.6.38)."""
    letters = [ord(letter) - 0x40 for letter in name[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(name[3:], 16)
    return b"\x0c" + value.to_bytes(4, "big")


def _package(body: bytes) -> bytes:
    """PkgLength and body (§20.2.4); the length counts its own bytes."""
    if len(body) + 1 < 0x40:
        return bytes((len(body) + 1,)) + body
    extra = 1 if len(body) + 2 < 1 << 12 else 2
    size = len(body) + 1 + extra
    return bytes((extra << 6 | size & 0xF,)) + (size >> 4).to_bytes(extra, "little") + body
