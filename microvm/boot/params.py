"""``struct boot_params``, the zero page (Documentation/arch/x86/zero-page.rst, boot.rst)."""

from __future__ import annotations

from struct import pack_into

from microvm import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: e820 types.
RAM, RESERVED, ACPI = 1, 2, 3

_SIZE = 4096
_LOADER_UNDEFINED = 0xFF  # type_of_loader: no registered boot loader
_PROTOCOL = 0x20F
_LOADED_HIGH = 0x01  # loadflags


def e820_map(memory: int, *, acpi: bool) -> tuple[tuple[int, int, int], ...]:
    """(address, size, type) of the guest's memory; ``memory`` is all its RAM in bytes."""
    low = min(memory, layout.RAM_LOW_END)
    entries = [
        (0, layout.EBDA_GPA, RAM),
        (layout.EBDA_GPA, 0xA0000 - layout.EBDA_GPA, RESERVED),
    ]
    if acpi:
        entries.append((layout.ACPI_GPA, layout.HIGH_RAM_GPA - layout.ACPI_GPA, ACPI))
    entries.append((layout.HIGH_RAM_GPA, low - layout.HIGH_RAM_GPA, RAM))
    if memory > low:
        entries.append((layout.RAM_HIGH_GPA, memory - low, RAM))
    return tuple(entries)


def boot_params(
    e820: Sequence[tuple[int, int, int]], *, initrd: tuple[int, int] = (0, 0), rsdp: int = 0
) -> bytes:
    """The page at BOOT_PARAMS_GPA. ``initrd`` is (address, size); 0 stands for none."""
    page = bytearray(_SIZE)
    pack_into("<Q", page, 0x070, rsdp)  # acpi_rsdp_addr
    pack_into("<I", page, 0x0C0, initrd[0] >> 32)  # ext_ramdisk_image
    low_end = max(start + size for start, size, _ in e820 if start < layout.RAM_LOW_END)
    pack_into("<I", page, 0x1E0, (low_end - layout.HIGH_RAM_GPA) >> 10)  # alt_mem_k
    page[0x1E8] = len(e820)
    pack_into("<H", page, 0x1FE, 0xAA55)  # boot_flag
    pack_into("<4sH", page, 0x202, b"HdrS", _PROTOCOL)
    page[0x210] = _LOADER_UNDEFINED
    page[0x211] = _LOADED_HIGH
    pack_into("<II", page, 0x218, initrd[0] & 0xFFFFFFFF, initrd[1])  # ramdisk_image, _size
    pack_into("<I", page, 0x228, layout.CMDLINE_GPA)  # cmd_line_ptr
    for index, entry in enumerate(e820):
        pack_into("<QQI", page, 0x2D0 + 20 * index, *entry)
    return bytes(page)
