"""Which modules a guest needs, and in which order they load.

A stock kernel keeps virtio, vsock and file systems as modules. What depends on what stands in each
module's ``.modinfo`` section; ``modules.dep`` is made by the package's post-install script, so a
package that was only unpacked has none.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable
from typing import Protocol

from microvm._record import Record
from microvm.errors import ConfigError

#: What guests use, in the order of use; a kernel has some built in and may lack others.
WANTED = (
    "virtio_mmio",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "overlay",
    "crc32c_generic",  # what ext4 asks modprobe for, which guests do not have
    "ext4",
    "fuse",
    "virtiofs",
    "9p",
    "9pnet_virtio",
)

_MODULE_MAX = 64 << 20  # bytes of one module, unpacked
_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


class Source(Protocol):
    """Module files by their path."""

    def names(self) -> Iterable[str]:
        """Paths of all files."""

    def read(self, name: str) -> bytes:
        """The bytes of one."""


class ModuleTree:
    """Modules in a directory: /lib/modules/VERSION."""

    def __init__(self, root: str) -> None:
        self._root = root

    def names(self) -> Iterable[str]:
        for folder, _, files in os.walk(self._root):
            for file in files:
                yield os.path.join(folder, file)

    def read(self, name: str) -> bytes:
        with open(name, "rb") as file:
            return file.read(_MODULE_MAX)


class ModuleArchive:
    """Modules in a tar archive that can be read at random."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members = {member.name: member for member in archive if member.isreg()}

    def names(self) -> Iterable[str]:
        return self._members

    def read(self, name: str) -> bytes:
        file = self._archive.extractfile(self._members[name])
        return file.read(_MODULE_MAX) if file is not None else b""


class Module(Record):
    """A module: its name with underscores, and its ELF file."""

    name: str
    data: bytes

    @property
    def file_name(self) -> str:
        """Its file's name in the store and in the guest."""
        return f"{self.name}.ko"


def select_modules(source: Source, wanted: Iterable[str] = WANTED) -> list[Module]:
    """The wanted modules that exist, each after those that it depends on.

    Raises ``ConfigError`` if one is damaged or one that it needs is missing.
    """
    paths = {_module_name(path): path for path in source.names() if path.endswith(_SUFFIXES)}
    builtin = _builtin(source)
    chosen: dict[str, Module] = {}
    for name in wanted:
        if _canonical(name) in paths:
            _add(_canonical(name), paths, builtin, source, chosen, ())
    return list(chosen.values())


def _add(
    name: str,
    paths: dict[str, str],
    builtin: set[str],
    source: Source,
    chosen: dict[str, Module],
    above: tuple[str, ...],
) -> None:
    if name in chosen or name in builtin:
        return
    if name not in paths or name in above:
        raise ConfigError(f"kernel module {above[-1]} needs {name}, which is not there")
    data = _unpack(paths[name], source.read(paths[name]))
    depends, soft = _needs(data, paths[name])
    for other in depends:
        _add(other, paths, builtin, source, chosen, (*above, name))
    for other in soft:
        if other in paths and other not in above:
            _add(other, paths, builtin, source, chosen, (*above, name))
    chosen[name] = Module(name=name, data=data)


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def _module_name(path: str) -> str:
    return _canonical(os.path.basename(path).split(".ko", 1)[0])


def _builtin(source: Source) -> set[str]:
    for path in source.names():
        if os.path.basename(path) == "modules.builtin":
            text = source.read(path).decode("ascii", "replace")
            return {_module_name(line) for line in text.split()}
    return set()


def _unpack(path: str, data: bytes) -> bytes:
    try:
        if path.endswith(".xz"):
            data = lzma.LZMADecompressor().decompress(data, _MODULE_MAX)
        elif path.endswith(".gz"):
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(_MODULE_MAX)
        elif path.endswith(".zst"):
            import zstandard

            reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data))
            data = reader.read(_MODULE_MAX)
    except Exception as error:  # the decompressors share no base class
        raise ConfigError(f"{path}: kernel module is damaged: {error}") from error
    if not data.startswith(b"\x7fELF"):
        raise ConfigError(f"{path}: kernel module is damaged: not an ELF file")
    return data


def _needs(data: bytes, path: str) -> tuple[list[str], list[str]]:
    """Modules that must be, and modules that should be loaded before this one."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        section = ELFFile(io.BytesIO(data)).get_section_by_name(".modinfo")
        info = section.data() if section is not None else b""
    except (ELFError, ValueError, OSError, zlib.error) as error:
        raise ConfigError(f"{path}: kernel module is damaged: {error}") from error
    depends: list[str] = []
    soft: list[str] = []
    for field in info.split(b"\0"):
        key, _, value = field.decode("ascii", "replace").partition("=")
        if key == "depends":
            depends += (_canonical(name) for name in value.split(",") if name)
        elif key == "softdep" and value.startswith("pre:"):
            soft += (_canonical(name) for name in value.split()[1:] if not name.endswith(":"))
    return depends, soft
