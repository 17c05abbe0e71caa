"""Lays out a guest's memory for its first instruction.

What it gives is a list of things to place, addresses checked and disjoint; the VMM executes it
without thinking. RAM is zero, so nothing is said about what is zero.
"""

from __future__ import annotations

import os

from microvm import layout
from microvm._record import Record
from microvm.boot import cmdline, params, tables
from microvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from microvm.boot.kernel import Kernel

PAGE = 4096


class FileMap(Record):
    """``length`` bytes at ``offset`` of a file, mapped copy-on-write at ``gpa``.

    ``gpa`` and ``offset`` are page aligned; the rest of the last page is zero.
    """

    gpa: int
    path: str
    offset: int
    length: int


class BootImage(Record):
    """Everything that is in guest memory at the first instruction, and the first CPU's registers.

    Addresses are guest-physical, sizes bytes.
    """

    ram: tuple[tuple[int, int], ...]  #: (address, size) of the RAM slots
    data: tuple[tuple[int, bytes], ...]  #: (address, bytes) to copy there
    files: tuple[FileMap, ...]
    rip: int
    rsi: int  #: address of boot_params
    rsp: int  #: below the EBDA; the kernel sets its own before it pushes
    cr3: int
    gdt: int  #: four descriptors; CS is 0x10, the data segments 0x18
    e820: tuple[tuple[int, int, int], ...]  #: (address, size, type)
    cmdline: str


def ram_slots(memory: int) -> tuple[tuple[int, int], ...]:
    """(address, size) of each piece of RAM, around the hole below 4 GiB."""
    if memory <= layout.RAM_LOW_END:
        return ((0, memory),)
    return (0, layout.RAM_LOW_END), (layout.RAM_HIGH_GPA, memory - layout.RAM_LOW_END)


def build_boot_image(
    kernel: Kernel,
    *,
    memory: int,
    cpus: int = 1,
    virtio: int = 0,
    initrds: Sequence[str] = (),
    cmdline_text: str | None = None,
    extra: str = "",
    verbose: bool = False,
) -> BootImage:
    """Plans the memory of a guest.

    ``memory`` is RAM in bytes, a multiple of the page; ``virtio`` the number of virtio devices;
    ``initrds`` are files that the kernel unpacks one after the other; ``cmdline_text`` stands in
    for the default command line, ``extra`` follows it; ``verbose`` lets the kernel talk. Raises
    ``ConfigError``.
    """
    _check_machine(memory, cpus, virtio)
    low_end = min(memory, layout.RAM_LOW_END)
    if kernel.end > low_end:
        raise ConfigError(
            f"{kernel.path}: the kernel needs RAM up to {kernel.end >> 20} MiB,"
            f" the guest has {memory >> 20} MiB: give it more memory"
        )
    if cmdline_text is None:
        cmdline_text = cmdline.default_cmdline(kernel, virtio=virtio, verbose=verbose)
    if extra:
        cmdline_text = f"{cmdline_text} {extra}".lstrip()
    initrd, initrd_files = _place_initrds(initrds, kernel, low_end)
    use_acpi = not kernel.is_tuned
    e820 = params.e820_map(memory, acpi=use_acpi)
    rsdp = layout.ACPI_GPA if use_acpi else 0
    return BootImage(
        ram=ram_slots(memory),
        data=(
            (layout.GDT_GPA, tables.gdt()),
            (layout.BOOT_PARAMS_GPA, params.boot_params(e820, initrd=initrd, rsdp=rsdp)),
            (layout.PML4_GPA, tables.page_tables(kernel.end)),
            (layout.CMDLINE_GPA, cmdline.encode(cmdline_text)),
            _describe_machine(use_acpi, cpus, virtio),
        ),
        files=(
            *(
                FileMap(gpa=kernel.base + o, path=kernel.image, offset=o, length=n)
                for o, n in kernel.extents
            ),
            *initrd_files,
        ),
        rip=kernel.entry,
        rsi=layout.BOOT_PARAMS_GPA,
        rsp=layout.EBDA_GPA,
        cr3=layout.PML4_GPA,
        gdt=layout.GDT_GPA,
        e820=e820,
        cmdline=cmdline_text,
    )


def _describe_machine(use_acpi: bool, cpus: int, virtio: int) -> tuple[int, bytes]:
    """CPUs and interrupt lines, in the least form that the kernel reads; imports only that."""
    if use_acpi:
        from microvm.boot.acpi import acpi_tables

        return layout.ACPI_GPA, acpi_tables(cpus, virtio)
    from microvm.boot.mptable import mp_table

    lines = (layout.GSI_SERIAL, *range(layout.GSI_VIRTIO, layout.GSI_VIRTIO + virtio))
    return layout.EBDA_GPA, mp_table(cpus, lines)


def _check_machine(memory: int, cpus: int, virtio: int) -> None:
    if not layout.RAM_MIN <= memory <= layout.RAM_MAX:
        raise ConfigError(
            f"memory of {memory} bytes: {layout.RAM_MIN >> 20} MiB to"
            f" {layout.RAM_MAX >> 30} GiB are possible"
        )
    if memory % PAGE:
        raise ConfigError(f"memory of {memory} bytes is not a multiple of {PAGE}")
    if not 1 <= cpus <= layout.VCPUS_MAX:
        raise ConfigError(f"{cpus} CPUs: 1 to {layout.VCPUS_MAX} are possible")
    if not 0 <= virtio <= layout.VIRTIO_MMIO_MAX:
        raise ConfigError(f"{virtio} virtio devices: at most {layout.VIRTIO_MMIO_MAX} are possible")


def _place_initrds(
    paths: Sequence[str], kernel: Kernel, low_end: int
) -> tuple[tuple[int, int], tuple[FileMap, ...]]:
    """((address, size), mappings) of all initrds, as high as possible, each on its own pages.

    The kernel skips zero bytes between archives, so the rest of a page is no obstacle.
    """
    sizes = [_file_size(path) for path in paths]
    rounded = [(size + PAGE - 1) & -PAGE for size in sizes]
    if not sum(rounded):
        return (0, 0), ()
    top = min(low_end, kernel.initrd_max + 1) & -PAGE
    start = top - sum(rounded)
    if start < (kernel.end + PAGE - 1) & -PAGE:
        raise ConfigError(
            f"{paths[0]}: initrd of {sum(sizes) >> 20} MiB does not fit between the kernel"
            f" (it ends at {kernel.end >> 20} MiB) and {top >> 20} MiB: give the guest more memory"
        )
    files = []
    gpa = start
    for path, size, room in zip(paths, sizes, rounded, strict=True):
        if size:
            files.append(FileMap(gpa=gpa, path=path, offset=0, length=size))
        gpa += room
    return (start, top - start - rounded[-1] + sizes[-1]), tuple(files)


def _file_size(path: str) -> int:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot open initrd: {error.strerror}") from error
    if stat.st_mode & 0o170000 != 0o100000:
        raise ConfigError(f"{path}: initrd is not a regular file")
    return stat.st_size
