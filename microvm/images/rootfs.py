"""Builds what :mod:`microvm.images.initramfs` caches. Never on the way of a second boot."""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile

from microvm.errors import ConfigError, HostError
from microvm.images import cpio
from microvm.images.skeleton import skeleton
from microvm.images.strip import strip_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MODULE_DIR = "lib/microvm"  # as in rootfs/modules.c and rootfs/applets.c
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
    """The archive of modules: (file name, content), in the order in which they load.

    What the guest does not need of them is left out.
    """
    listing = "".join(f"{name}\n" for name, _ in modules)
    return cpio.pack(
        [
            *(cpio.regular(f"{MODULE_DIR}/{name}", strip_module(data)) for name, data in modules),
            cpio.regular(f"{MODULE_DIR}/modules.list", listing.encode()),
        ]
    )


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
