"""The store of kernels, and which of them a guest gets.

``$XDG_DATA_HOME/microvm/kernels/ORIGIN/NAME/`` holds one kernel:

``vmlinux`` or ``vmlinuz``   the image
``modules/``                 modules that a guest needs, plain; ``modules.list`` is their order
``config``                   its configuration, where it is known

ORIGIN says how it got here, which decides the default: a kernel that was built is better than one
that was pulled, which is better than a copy of the host's. Imported ones are used by name only.
Finding a kernel is on the way to every boot: a directory or two are read, nothing else.
"""

from __future__ import annotations

import os

from microvm._record import Record
from microvm.dirs import data_dir
from microvm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

BUILT: Final = "built"
PULLED: Final = "pulled"
HOST: Final = "host"
IMPORTED: Final = "imported"

_BY_DEFAULT = (BUILT, PULLED, HOST)
_ORIGINS = (*_BY_DEFAULT, IMPORTED)
_IMAGES = ("vmlinux", "vmlinuz")
MODULES: Final = "modules"
MODULES_LIST: Final = "modules.list"


class StoredKernel(Record):
    """A kernel in the store."""

    name: str
    origin: str  #: BUILT, PULLED, HOST or IMPORTED
    path: str  #: of the image
    is_default: bool = False


def store_dir() -> str:
    """Where kernels are kept; it need not exist."""
    return os.path.join(data_dir(), "kernels")


def find_kernel(spec: str | None = None) -> str:
    """The path of a kernel image: of a file, of a kernel in the store by name, or the default.

    Raises ``ConfigError`` if there is none.
    """
    if spec is None:
        return default_kernel().path
    if "/" in spec or os.path.isfile(spec):
        return spec
    for origin in _ORIGINS:
        found = _stored(origin, spec)
        if found is not None:
            return found.path
    names = ", ".join(kernel.name for kernel in list_kernels()) or "none yet"
    raise ConfigError(f"kernel {spec!r} is neither a file nor one of the store (there: {names})")


def default_kernel() -> StoredKernel:
    """The newest kernel built, else pulled, else copied from the host.

    Raises ``ConfigError`` if there is none.
    """
    for origin in _BY_DEFAULT:
        kernels = _in_origin(origin)
        if kernels:
            return kernels[0]
    raise ConfigError("there is no guest kernel yet: run `microvm kernel pull`")


def list_kernels() -> list[StoredKernel]:
    """All kernels of the store, the best first."""
    kernels = [kernel for origin in _ORIGINS for kernel in _in_origin(origin)]
    if kernels and kernels[0].origin != IMPORTED:
        kernels[0] = kernels[0].replace(is_default=True)
    return kernels


def modules_for(path: str) -> tuple[str, ...]:
    """Files of the modules that belong to a kernel image of the store, in the order to load them.

    Empty for a kernel that needs none, or that is not of the store.
    """
    folder = os.path.join(os.path.dirname(path), MODULES)
    try:
        with open(os.path.join(folder, MODULES_LIST), encoding="utf-8") as file:
            return tuple(os.path.join(folder, name) for name in file.read().split())
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise HostError(f"{folder}: cannot read module list: {error.strerror}") from error


def remove_kernel(name: str) -> StoredKernel:
    """Removes a kernel from the store and says which. Raises ``ConfigError`` if it is not there."""
    import shutil

    for origin in _ORIGINS:
        kernel = _stored(origin, name)
        if kernel is not None:
            shutil.rmtree(os.path.dirname(kernel.path))
            return kernel
    raise ConfigError(f"kernel {name!r} is not in the store: `microvm kernel ls` shows what is")


def import_kernel(path: str, name: str | None = None, modules: str | None = None) -> StoredKernel:
    """Copies a kernel file into the store, after checking that it can be booted.

    ``modules`` is its tree of modules, as /lib/modules/VERSION. Raises ``ConfigError``,
    ``HostError``.
    """
    from microvm.boot.kernel import load_kernel
    from microvm.images import install
    from microvm.images.modules import ModuleTree

    kernel = load_kernel(path)
    tree = ModuleTree(modules) if modules else None
    chosen = name or kernel.version or os.path.basename(path)
    return install.install(chosen, IMPORTED, install.from_files(path, tree=tree))


def _in_origin(origin: str) -> list[StoredKernel]:
    """Kernels of one origin, the newest first."""
    folder = os.path.join(store_dir(), origin)
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError(f"{folder}: cannot read kernel store: {error.strerror}") from error
    if len(names) > 1:
        names.sort(key=lambda name: os.stat(os.path.join(folder, name)).st_mtime_ns, reverse=True)
    found = (_stored(origin, name) for name in names)
    return [kernel for kernel in found if kernel is not None]


def _stored(origin: str, name: str) -> StoredKernel | None:
    if not name or "/" in name or name.startswith("."):
        return None
    for image in _IMAGES:
        path = os.path.join(store_dir(), origin, name, image)
        if os.path.isfile(path):
            return StoredKernel(name=name, origin=origin, path=path)
    return None
