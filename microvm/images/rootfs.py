"""Builds what :mod:`microvm.images.initramfs` caches. Never on the way of a second boot."""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile

from microvm.errors import ConfigError, HostError
from microvm.images import cpio
from microvm.images.module_file import module_info, strip_module
from microvm.images.skeleton import skeleton

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MODULE_DIR = "lib/microvm"  # as in rootfs/modules.c and rootfs/applets.c
#: Drivers of the devices that guests have.
_AT_BOOT = (
    "virtio_mmio",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    "virtio_console",
    "virtio_blk",
)
_BUSYBOX_MAX = 16 << 20
_PT_INTERP = 3


def build_base(init: bytes, busybox: bytes) -> bytes:
    """The base archive. Raises ``ConfigError`` if a program cannot run in the guest."""
    for name, program in (("init", init), ("busybox", busybox)):
        if not is_static(program):
            raise ConfigError(f"{name} is not a static x86-64 program: the guest cannot run it")
    names = "".join(f"{name}\n" for name in applets(busybox))
    return cpio.pack(
        [
            *skeleton(),
            cpio.regular("init", init, 0o755),
            cpio.regular("bin/busybox", busybox, 0o755),
            cpio.regular(f"{MODULE_DIR}/applets", names.encode()),
        ]
    )


def build_modules(modules: Sequence[tuple[str, bytes]]) -> bytes:
    """The archive of modules: (file name, content), each after those that it depends on.

    Drivers of our devices load at boot; the rest when the kernel or a user calls modprobe, for
    which there are the files that depmod would make. What the guest does not need of a module is
    left out. Raises ``ConfigError`` if one is damaged.
    """
    info = {name: _module_info(name, data) for name, data in modules}
    release = next((v.split()[0] for k, v in info[modules[0][0]] if k == "vermagic" and v), "")
    if not release or "/" in release:
        raise ConfigError(f"{modules[0][0]}: kernel module does not say for which kernel it is")
    depends = {name: _depends(fields, info) for name, fields in info.items()}
    wanted = {
        name for first in depends if _bare(first) in _AT_BOOT for name in (first, *depends[first])
    }
    folder = f"lib/modules/{release}"
    boot = "".join(f"/{folder}/{name}\n" for name, _ in modules if name in wanted)
    dep = "".join(f"{name}: {' '.join(others)}\n" for name, others in depends.items())
    alias = "".join(
        f"alias {value} {_bare(name)}\n"
        for name, fields in info.items()
        for key, value in fields
        if key == "alias"
    )
    return cpio.pack(
        [
            cpio.directory("lib/modules"),
            cpio.directory(folder),
            *(cpio.regular(f"{folder}/{name}", strip_module(data)) for name, data in modules),
            cpio.regular(f"{folder}/modules.dep", dep.encode()),
            cpio.regular(f"{folder}/modules.alias", alias.encode()),
            cpio.regular(f"{folder}/modules.symbols", b""),
            cpio.regular(f"{MODULE_DIR}/modules.list", boot.encode()),
            cpio.symlink("bin/modprobe", "busybox"),  # before /init has made the other names
        ]
    )


def _module_info(name: str, data: bytes) -> list[tuple[str, str]]:
    try:
        return module_info(data)
    except ValueError as error:
        raise ConfigError(f"{name}: kernel module is damaged: {error}") from error


def _bare(file_name: str) -> str:
    return file_name.split(".", 1)[0].replace("-", "_")


def _depends(fields: list[tuple[str, str]], info: dict[str, list[tuple[str, str]]]) -> list[str]:
    """File names of all that a module needs, what it needs most directly first, as depmod does."""
    by_name = {_bare(name): name for name in info}
    found: list[str] = []
    for key, value in fields:
        for other in value.split(",") if key == "depends" else ():
            name = by_name.get(other.replace("-", "_"))
            if name is not None:
                found = [have for have in found if have != name]
                deeper = _depends(info[name], info)
                found = [have for have in found if have not in deeper] + [name, *deeper]
    return found


def is_static(program: bytes) -> bool:
    """Whether it is an ELF program for x86-64 that asks for no dynamic loader."""
    if len(program) < 64 or program[:5] != b"\x7fELF\x02" or program[18:20] != b"\x3e\0":
        return False
    (offset,) = struct.unpack_from("<Q", program, 32)
    size, count = struct.unpack_from("<HH", program, 54)
    if size < 56 or offset + size * count > len(program):
        return False
    kinds = (struct.unpack_from("<I", program, offset + size * i)[0] for i in range(count))
    return _PT_INTERP not in kinds


def applets(busybox: bytes) -> list[str]:
    """The names that a busybox answers to, by running it."""
    with tempfile.TemporaryDirectory(prefix="microvm-") as folder:
        path = os.path.join(folder, "busybox")
        with open(path, "wb") as file:
            file.write(busybox)
        os.chmod(path, 0o755)
        try:
            done = subprocess.run([path, "--list"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigError(f"busybox does not list its applets: {error}") from error
    names = sorted(set(done.stdout.split()) - {"busybox"})
    if "sh" not in names or any("/" in name for name in names):
        raise ConfigError("busybox lists no usable applets: it has no shell")
    return names


def fetch_busybox(package: str) -> bytes:
    """The static busybox out of the distribution's package. Raises ``HostError``."""
    from microvm.images import deb, pull

    with tempfile.TemporaryDirectory(prefix="microvm-") as folder:
        try:
            path = pull.download(package, folder, lambda _what, _done, _total: None)
        except HostError as error:
            raise HostError(f"no static busybox: install {package} ({error})") from error
        with deb.open_data(path) as archive:
            for member in archive:
                if member.isreg() and os.path.basename(member.name) == "busybox":
                    file = archive.extractfile(member)
                    return file.read(_BUSYBOX_MAX) if file else b""
    raise HostError(f"package {package} has no busybox in it")
