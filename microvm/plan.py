"""From a configuration to everything that the VMM is told, before there is a VMM.

All that can be wrong with files and options is found here: a plan that exists can be started.
"""

from __future__ import annotations

import os

from microvm import control
from microvm._record import Record
from microvm.boot.image import build_boot_image
from microvm.boot.kernel import load_kernel
from microvm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from microvm.boot.image import BootImage
    from microvm.boot.kernel import Kernel
    from microvm.config import MachineConfig
    from microvm.vmm import Vmm

_SECTOR = 512
# Documentation/filesystems/ext4/super.rst: the superblock lies at 1024, s_magic at 0x38 in it
_EXT4_MAGIC = b"\x53\xef"
_EXT4_MAGIC_AT = 1024 + 0x38

_ACCEL = {"kvm": control.KVM, "dbt": control.DBT}


class Plan(Record):
    """A machine, decided down to the last byte. ``why`` says why ``accel`` was chosen."""

    config: MachineConfig
    accel: str
    why: str
    kernel: Kernel
    initrds: tuple[str, ...]
    image: BootImage

    def sizes(self) -> dict[str, int]:
        """Bytes of the kernel that are mapped, and of the initramfs."""
        kernel = sum(length for _, length in self.kernel.extents)
        return {"kernel": kernel, "initrd": sum(os.stat(path).st_size for path in self.initrds)}

    def describe(self) -> str:
        """The plan in a few lines, for ``--dry-run``."""
        config = self.config
        lines = [
            ("accel", f"{self.accel} ({self.why})"),
            ("kernel", f"{self.kernel.path} ({self.kernel.version or 'version unknown'})"),
            *(("initrd", path) for path in self.initrds),
            *([("root", config.root)] if config.root else []),
            ("memory", f"{config.memory >> 20} MiB"),
            ("cpus", str(config.cpus)),
            ("cmdline", self.image.cmdline),
        ]
        return "\n".join(f"{name:<8} {value}" for name, value in lines) + "\n"


def make_plan(config: MachineConfig) -> Plan:
    """Finds the kernel, the initramfs and the backend. Raises ``ConfigError``, ``HostError``."""
    from microvm.accel import choose
    from microvm.images.kernels import find_kernel

    _check_host_memory(config.memory)
    if config.root is not None:
        _check_root(config.root)
    accel, why = choose(config.accel)
    if accel == "dbt" and config.cpus > 1:
        raise ConfigError(
            f"{config.cpus} CPUs: the translator runs one, more need KVM (backend: dbt, {why})"
        )
    kernel = load_kernel(find_kernel(config.kernel))
    initrds = _initrds(config, kernel)
    extra = [_root_words(config)] if config.root else []
    image = build_boot_image(
        kernel,
        memory=config.memory,
        cpus=config.cpus,
        virtio=_virtio_count(config),
        initrds=initrds,
        extra=" ".join([*extra, config.cmdline]).strip(),
        verbose=config.console_fd is not None,
    )
    return Plan(config=config, accel=accel, why=why, kernel=kernel, initrds=initrds, image=image)


def _check_host_memory(memory: int) -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory > there:
        raise HostError(
            f"memory of {memory >> 20} MiB is more than this host has ({there >> 20} MiB): "
            "give the guest less"
        )


def _check_root(path: str) -> None:
    """Finds out now what the guest would stumble over. A block device has no size to check."""
    fd = _open(path, os.O_RDONLY, "root image")
    try:
        size = os.fstat(fd).st_size
        if size % _SECTOR:
            raise ConfigError(
                f"{path}: root image of {size} bytes is not a multiple of {_SECTOR}: is it raw?"
            )
        if os.pread(fd, len(_EXT4_MAGIC), _EXT4_MAGIC_AT) != _EXT4_MAGIC:
            raise ConfigError(f"{path}: root image holds no ext4 file system: mkfs.ext4 makes one")
    except OSError as error:
        raise HostError(f"{path}: cannot read root image: {error.strerror}") from error
    finally:
        os.close(fd)


def _initrds(config: MachineConfig, kernel: Kernel) -> tuple[str, ...]:
    if config.initrd is not None:
        return (config.initrd,)
    from microvm.images.initramfs import initramfs_for

    return initramfs_for(kernel)


def _root_words(config: MachineConfig) -> str:
    return f"microvm.root=/dev/vda microvm.rootmode={'ro' if config.root_readonly else 'rw'}"


def _virtio_count(config: MachineConfig) -> int:
    return 2 + (config.root is not None)


def send_plan(plan: Plan, vmm: Vmm) -> None:
    """Tells the VMM all of it, START included. Raises ``ConfigError``, ``HostError``."""
    config, image = plan.config, plan.image
    flags = control.COUNT if config.count else 0
    saved = os.path.join(os.path.dirname(plan.kernel.image), "translations")
    vmm.send(control.options(_ACCEL[plan.accel], config.cpus, flags, saved=saved))
    for gpa, size in image.ram:
        vmm.send(control.ram(gpa, size))
    for gpa, content in image.data:
        for packet in control.data(gpa, content):
            vmm.send(packet)
    _send_files(image, vmm)
    _send_devices(config, vmm)
    vmm.send(control.entry(image.rip, image.rsi, image.rsp, image.cr3, image.gdt))
    vmm.send(control.start())


def _send_files(image: BootImage, vmm: Vmm) -> None:
    opened: dict[str, int] = {}
    try:
        for file in image.files:
            if file.path not in opened:
                opened[file.path] = _open(file.path, os.O_RDONLY, "file")
            packet = control.file(file.gpa, file.offset, file.length, control.MAP)
            vmm.send(packet, [opened[file.path]])
    finally:
        for fd in opened.values():
            os.close(fd)


def _send_devices(config: MachineConfig, vmm: Vmm) -> None:
    """In the order of their numbers; :func:`_virtio_count` counts them."""
    console = [] if config.console_fd is None else [config.console_fd]
    vmm.send(control.device(control.SERIAL), console)
    vmm.send(control.device(control.VSOCK))
    vmm.send(control.device(control.RNG))
    if config.root is not None:
        mode = os.O_RDONLY if config.root_readonly else os.O_RDWR
        fd = _open(config.root, mode, "root image")
        try:
            flags = control.READ_ONLY if config.root_readonly else 0
            vmm.send(control.device(control.BLK, flags), [fd])
        finally:
            os.close(fd)


def _open(path: str, mode: int, what: str) -> int:
    try:
        return os.open(path, mode | os.O_CLOEXEC)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: cannot open {what}: {error.strerror}") from error
    except OSError as error:
        raise HostError(f"{path}: cannot open {what}: {error.strerror}") from error
