"""What the CPU walks before the kernel has its own: page tables and GDT.

boot.rst, "64-bit boot protocol": paging on, the kernel, boot_params and command line mapped
one to one; CS is selector 0x10, DS, ES and SS are 0x18, both flat.
"""

from __future__ import annotations

from struct import pack

from microvm import layout

_PRESENT_WRITABLE = 0x3
_LARGE = 0x80  # a PD entry that maps 2 MiB; 1 GiB pages do not exist on every CPU
_GIB = 1 << 30

#: Null, unused, flat 64-bit code, flat data (SDM 3A §3.4.5). Limits are 4 GiB, accessed bits set.
_DESCRIPTORS = (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


def gdt() -> bytes:
    """The four descriptors at GDT_GPA."""
    return pack("<4Q", *_DESCRIPTORS)


def page_tables(end: int) -> bytes:
    """PML4, PDPT and page directories for PML4_GPA: at least [0, end) one to one, whole GiB.

    ``end`` is at most 4 GiB.
    """
    directories = max(1, -(-end // _GIB))
    pdpt = layout.PML4_GPA + 0x1000
    first = pdpt + 0x1000 | _PRESENT_WRITABLE
    pointers = pack(f"<{directories}Q", *range(first, first + 0x1000 * directories, 0x1000))
    flags = _PRESENT_WRITABLE | _LARGE
    large = range(flags, directories * _GIB + flags, 2 << 20)
    return (
        pack("<Q", pdpt | _PRESENT_WRITABLE).ljust(4096, b"\0")
        + pointers.ljust(4096, b"\0")
        + pack(f"<{len(large)}Q", *large)
    )
