"""The MP table: which CPUs there are and where interrupt lines end (MultiProcessor Spec 1.4).

Linux looks for the floating pointer in the last KiB of low memory; pointer and table both fit
there, with 32 CPUs and every pin. All lines are ISA lines, edge-triggered and active high (the
bus's own default): what a virtio device sends is a pulse.
"""

from __future__ import annotations

from struct import pack

from microvm import layout

_CPU, _BUS, _IOAPIC, _INTERRUPT, _LOCAL = range(5)  # entry types, §4.3
_ENABLED, _BOOT = 1, 2  # CPU flags
_INT, _NMI, _EXTINT = 0, 1, 3  # interrupt types, table 4-10
_TIMER = (0, 2)  # IRQ 0 at pin 2, as on a PC; a kernel that falls back to a PIT fails without
_APIC_VERSION = 0x14
_IOAPIC_VERSION = 0x11
_FEATURES = 0x0F8B_FBFF  # what the CPU's CPUID.1:EDX would say; informative


def mp_table(cpus: int, gsis: tuple[int, ...]) -> bytes:
    """Floating pointer and configuration table for EBDA_GPA. ``gsis`` are the lines in use."""
    ioapic_id = cpus  # APIC IDs are 0 to cpus - 1
    entries = [
        pack(
            "<BBBBIIxxxxxxxx",
            *(_CPU, cpu, _APIC_VERSION, _ENABLED | (0 if cpu else _BOOT), 0x600, _FEATURES),
        )
        for cpu in range(cpus)
    ]
    entries.append(pack("<BB6s", _BUS, 0, b"ISA   "))
    entries.append(pack("<BBBBI", _IOAPIC, ioapic_id, _IOAPIC_VERSION, 1, layout.IOAPIC_GPA))
    pins = (_TIMER, *((gsi, gsi) for gsi in gsis))
    entries += (pack("<BBHBBBB", _INTERRUPT, _INT, 0, 0, irq, ioapic_id, pin) for irq, pin in pins)
    entries.append(pack("<BBHBBBB", _LOCAL, _EXTINT, 0, 0, 0, 0xFF, 0))
    entries.append(pack("<BBHBBBB", _LOCAL, _NMI, 0, 0, 0, 0xFF, 1))
    body = b"".join(entries)
    header = pack(
        "<4sHBB8s12sIHHIHBB",
        *(b"PCMP", 44 + len(body), 4, 0, b"MICROVM ", b"MICROVM     "),
        *(0, 0, len(entries), layout.LAPIC_GPA, 0, 0, 0),
    )
    table = _with_checksum(header + body, 7)
    pointer = pack("<4sIBBBBBxxx", b"_MP_", layout.EBDA_GPA + 16, 1, 4, 0, 0, 0)
    return _with_checksum(pointer, 10) + table


def _with_checksum(table: bytes, at: int) -> bytes:
    """The table with the byte at ``at`` set so that all bytes add up to 0."""
    return table[:at] + bytes(((table[at] - sum(table)) & 0xFF,)) + table[at + 1 :]
