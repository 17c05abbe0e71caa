"""Writes cpio archives in the "newc" format, as the kernel unpacks them into its first root.

Uncompressed on purpose: the kernel copies what is not compressed, and that is a hundred times
fewer instructions than decompressing it. An archive is a pure function of its entries: no times,
no host's numbers, so equal contents make equal bytes.

The format: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's tree.
"""

from __future__ import annotations

import stat

from microvm._record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

PAGE = 4096
_TRAILER = "TRAILER!!!"
_HEADER_SIZE = 110


class Entry(Record):
    """One file. ``path`` has no leading slash; ``content`` is a symbolic link's target too."""

    path: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str, permissions: int = 0o755) -> Entry:
    """A directory; it must come before what is in it."""
    return Entry(path=path, mode=stat.S_IFDIR | permissions)


def regular(path: str, content: bytes, permissions: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(path=path, mode=stat.S_IFREG | permissions, content=content)


def symlink(path: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(path=path, mode=stat.S_IFLNK | 0o777, content=target.encode())


def character_device(path: str, major: int, minor: int, permissions: int) -> Entry:
    """A character device."""
    return Entry(path=path, mode=stat.S_IFCHR | permissions, device=(major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """The archive, a whole number of pages long.

    It ends exactly with its trailer, whose name is padded: the kernel walks over zeros between two
    archives byte by byte.
    """
    out = bytearray()
    for number, entry in enumerate(entries, 1):
        if not entry.path or entry.path.startswith("/"):
            raise ValueError(f"{entry.path!r} is no path of an archive")
        out += _header(number, entry, len(entry.path.encode()) + 1)
        out += entry.path.encode() + b"\0"
        out += bytes(-len(out) % 4)
        out += entry.content
        out += bytes(-len(out) % 4)
    name_size = len(_TRAILER) + 1
    name_size += -(len(out) + _HEADER_SIZE + name_size) % PAGE
    out += _header(0, Entry(path=_TRAILER, mode=0), name_size)
    out += _TRAILER.encode().ljust(name_size, b"\0")
    return bytes(out)


def _header(number: int, entry: Entry, name_size: int) -> bytes:
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    ids_and_times = (0, 0, links, 0)  # uid, gid, nlink, mtime
    fields = (number, entry.mode, *ids_and_times, len(entry.content), 0, 0, *entry.device)
    return b"070701" + b"".join(b"%08x" % field for field in (*fields, name_size, 0))
