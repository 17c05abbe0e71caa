"""A kernel file, parsed once and cached in a form that is mapped.

Under ``$XDG_CACHE_HOME/microvm/kernels``:

``CONTENT/image``   guest memory from the kernel's first page on (see :mod:`microvm.boot.flat`)
``CONTENT/meta``    what is known about it: lines of a name and a value
``by-stat/KEY``     a symbolic link to such a ``meta``

CONTENT is a hash of the file's bytes, KEY its device, inode, size and times. So a boot costs one
``stat`` and one small read, nothing is imported that parses, and a kernel that was rebuilt in
place is seen as new. ``meta`` is a line format of our own because importing ``json`` takes longer
than all the rest together.
"""

from __future__ import annotations

import os

from microvm._record import Record
from microvm.dirs import cache_dir
from microvm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from microvm.boot import flat

#: Bits of ``Kernel.features``: what the image can do, found by the words in it.
MPTABLE: Final = 1  #: parses MP tables
MMIO_CMDLINE: Final = 2  #: takes virtio_mmio.device= on its command line
ACPI: Final = 4  #: has an ACPI interpreter
NO_MITIGATIONS: Final = 8  #: was compiled without them

_FORMAT = "microvm-kernel 1"
_KEPT = 12  # images in the cache; the oldest go first


class Kernel(Record):
    """A kernel that is ready to be mapped. All addresses are guest-physical."""

    path: str  #: of the file that the user named
    version: str  #: "6.12.1-foo", or "" if the image does not say
    features: int  #: MPTABLE | MMIO_CMDLINE | ...
    entry: int  #: 64-bit entry point
    base: int  #: where offset 0 of the image goes
    end: int  #: first byte after its .bss
    initrd_max: int  #: last address that an initrd may occupy
    image: str  #: the flat image
    extents: tuple[tuple[int, int], ...]  #: (offset, length) in the image, page aligned

    @property
    def is_tuned(self) -> bool:
        """Whether it finds CPUs and devices without ACPI."""
        return self.features & (MPTABLE | MMIO_CMDLINE) == MPTABLE | MMIO_CMDLINE


def load_kernel(path: str) -> Kernel:
    """Opens a vmlinux or bzImage, from the cache if it has been seen.

    Raises ``ConfigError`` if the file is missing or no good kernel, ``HostError`` if the cache
    cannot be written.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot open kernel: {error.strerror}") from error
    root = os.path.join(cache_dir(), "kernels")
    times = f"{stat.st_mtime_ns:x}-{stat.st_ctime_ns:x}"
    key = f"{stat.st_dev:x}-{stat.st_ino:x}-{stat.st_size:x}-{times}"
    link = os.path.join(root, "by-stat", key)
    return _read(path, link, root) or _add(path, link, root)


def _read(path: str, link: str, root: str) -> Kernel | None:
    """The cached kernel; None if there is none, or not a whole one."""
    try:
        with open(link, encoding="utf-8") as file:
            lines = file.read().split("\n")
        if lines[0] != _FORMAT or lines[-1] != "end":
            return None
        content, version, features, entry, base, end, initrd_max, size = lines[1:9]
        image = os.path.join(root, content, "image")
        if os.stat(image).st_size != int(size):
            return None
        extents = tuple((int(a), int(b)) for a, b in (line.split() for line in lines[9:-1]))
        return Kernel(
            path=path,
            version=version,
            features=int(features),
            entry=int(entry),
            base=int(base),
            end=int(end),
            initrd_max=int(initrd_max),
            image=image,
            extents=extents,
        )
    except (OSError, ValueError):
        return None


def _add(path: str, link: str, root: str) -> Kernel:
    """Parses a kernel, writes it to the cache and reads it back."""
    from microvm.boot import flat

    try:
        parsed = flat.parse(path)
        content = flat.store(parsed, root, _describe)
        os.makedirs(os.path.dirname(link), mode=0o700, exist_ok=True)
        flat.link(os.path.join("..", content, "meta"), link)
        flat.prune(root, keep=_KEPT)
    except OSError as error:
        raise HostError(
            f"{root}: cannot write the kernel cache: {error.strerror} "
            "(another place can be set with XDG_CACHE_HOME)"
        ) from error
    kernel = _read(path, link, root)
    if kernel is None:
        raise HostError(f"{root}: the kernel cache does not keep what is written to it")
    return kernel


def _describe(content: str, parsed: flat.Parsed) -> str:
    """The text of a ``meta`` file."""
    fields = (
        _FORMAT,
        content,
        parsed.version,
        parsed.features,
        parsed.entry,
        parsed.base,
        parsed.end,
        parsed.initrd_max,
        len(parsed.memory),
        *(f"{offset} {length}" for offset, length in parsed.extents),
        "end",
    )
    return "\n".join(str(field) for field in fields)
