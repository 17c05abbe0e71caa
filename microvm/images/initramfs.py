"""The guest's first root: our PID 1, busybox, and the modules that a stock kernel needs.

Two archives, which the kernel unpacks one after the other: a base for all kernels, and the
modules of one. Under ``$XDG_CACHE_HOME/microvm/initramfs``:

``CONTENT.cpio``    an archive; CONTENT is a hash of its bytes
``by-stat/KEY``     a symbolic link to the archive that was made from files with these
                    devices, inodes, sizes and times (our own code among them)

So a boot costs a ``stat`` for each input that can change, and nothing is imported that builds.

The archives are not compressed: the kernel copies the base's 2.0 MB in 1.1 million instructions.
As gzip it would be 1.05 MB and take 41 million, twice what the rest of the boot takes. Busybox's
270 names are not in them either: a link costs the guest less than an archive's entry does, so
/init makes them.
"""

from __future__ import annotations

import os

from microvm.dirs import cache_dir
from microvm.errors import ConfigError, HostError
from microvm.images.kernels import MODULES, MODULES_LIST, modules_for

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from microvm.boot.kernel import Kernel

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_INITS = (
    os.path.join(_PACKAGE, "bin", "init"),
    os.path.join(os.path.dirname(_PACKAGE), "build", "rootfs", "init"),
)
_BUSYBOXES = ("/bin/busybox", "/usr/bin/busybox")
_BUILDERS = tuple(
    os.path.join(_PACKAGE, "images", name) for name in ("rootfs.py", "skeleton.py")
)  # what decides what is in an archive
_BUSYBOX_PACKAGE = "busybox-static"
_KEPT = 12  # archives in the cache; the oldest go first


def initramfs_for(kernel: Kernel) -> tuple[str, ...]:
    """Paths of the archives that ``kernel`` is to unpack, in their order.

    Raises ``HostError`` if there is no PID 1 or no busybox and none can be had, or the cache
    cannot be written; ``ConfigError`` if a file is damaged.
    """
    base = base_initramfs()
    modules = modules_initramfs(kernel.path)
    return (base, modules) if modules else (base,)


def base_initramfs() -> str:
    """The archive that all kernels share: PID 1, busybox, the files around them."""
    init = find_init()
    inputs = [init, *_BUSYBOXES, *_BUILDERS]

    def build() -> bytes:
        from microvm.images import rootfs

        return rootfs.build_base(_read(init), _read(find_busybox()))

    return _cached("base", inputs, build)


def modules_initramfs(kernel_path: str) -> str | None:
    """The archive of the modules that belong to a kernel of the store; None if it needs none."""
    files = modules_for(kernel_path)
    if not files:
        return None
    listing = os.path.join(os.path.dirname(kernel_path), MODULES, MODULES_LIST)

    def build() -> bytes:
        from microvm.images import rootfs

        return rootfs.build_modules([(os.path.basename(file), _read(file)) for file in files])

    return _cached("modules", [listing, *_BUILDERS], build)


def find_init() -> str:
    """Path of our PID 1. Raises ``HostError`` if it has not been built."""
    for path in _INITS:
        if os.path.exists(path):
            return path
    raise HostError(f"{_INITS[-1]}: the guest's init has not been built: run `make build`")


def find_busybox() -> str:
    """Path of a static busybox: the host's, else the distribution's package, fetched once.

    Raises ``HostError`` if there is neither.
    """
    from microvm.images import rootfs

    for path in _BUSYBOXES:
        if os.path.exists(path) and rootfs.is_static(_read(path)):
            return path
    path = os.path.join(cache_dir(), "busybox")
    if not os.path.exists(path):
        _write(path, rootfs.fetch_busybox(_BUSYBOX_PACKAGE), 0o755)
    return path


def _cached(kind: str, inputs: list[str], build: Callable[[], bytes]) -> str:
    """The archive that was built from these inputs, or is built now."""
    root = os.path.join(cache_dir(), "initramfs")
    link = os.path.join(root, "by-stat", "_".join((kind, *map(_identity, inputs))))
    try:
        os.stat(link)
    except FileNotFoundError:
        _add(root, link, build())
    except OSError as error:
        raise HostError(f"{link}: cannot read: {error.strerror}") from error
    return link


def _identity(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return "none"
    return f"{stat.st_dev:x}-{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}"


def _add(root: str, link: str, archive: bytes) -> None:
    from hashlib import sha256

    name = f"{sha256(archive).hexdigest()[:32]}.cpio"
    _write(os.path.join(root, name), archive, 0o644)
    try:
        os.makedirs(os.path.dirname(link), exist_ok=True)
        temporary = f"{link}.{os.getpid()}"
        os.symlink(os.path.join("..", name), temporary)
        os.replace(temporary, link)
        _evict(root)
    except OSError as error:
        raise HostError(f"{link}: cannot write to the cache: {error.strerror}") from error


def _evict(root: str) -> None:
    """Removes the oldest archives, and links to what is no longer there."""
    archives = [os.path.join(root, name) for name in os.listdir(root) if name.endswith(".cpio")]
    archives.sort(key=lambda path: os.stat(path).st_mtime_ns)
    for path in archives[:-_KEPT]:
        os.unlink(path)
    links = os.path.join(root, "by-stat")
    for name in os.listdir(links):
        if not os.path.exists(os.path.join(links, name)):
            os.unlink(os.path.join(links, name))


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}") from error


def _write(path: str, data: bytes, mode: int) -> None:
    """Puts a file in place, whole or not at all."""
    temporary = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        raise HostError(f"{path}: cannot write to the cache: {error.strerror}") from error
