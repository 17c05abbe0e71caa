"""Makes a flat image of a kernel: the file that later boots map instead of parsing anything.

The image is guest memory itself, from the page of the first segment on, offset by offset. Where
it is zero for long (.bss, .brk, alignment) nothing is mapped, since RAM is zero already: an
extent is a run of pages with something in them, worth a mapping of its own. The file is sparse.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable

from microvm import layout
from microvm._record import Record
from microvm.boot import bzimage, elf, kernel
from microvm.errors import ConfigError

PAGE = 4096
_GAP = 16  # zero pages between two extents; fewer are cheaper to map than to leave out
_SCAN = 64 * PAGE
_FILE_MAX = 2 << 30  # a vmlinux with all its debug information is under 1 GiB
_SPAN_MAX = 512 << 20  # from the first loaded byte to the last

#: What tells a feature: a message that only this code prints.
_WORDS = (
    (kernel.MPTABLE, b"MPTABLE: no processors registered"),
    (kernel.MMIO_CMDLINE, b"Registering device virtio-mmio."),
    (kernel.ACPI, b"Interpreter enabled"),
    (kernel.NO_MITIGATIONS, b"Kernel compiled without mitigations"),
)
_VERSION = re.compile(rb"Linux version (\d[\x21-\x7e]{0,63})")


class Parsed(Record):
    """What was found in a kernel file. Addresses are guest-physical."""

    digest: str  #: of the file
    version: str
    features: int
    entry: int
    base: int
    end: int
    initrd_max: int
    memory: bytearray  #: from base on
    extents: list[tuple[int, int]]


def parse(path: str) -> Parsed:
    """Reads a vmlinux or bzImage. Raises ``ConfigError`` with one clear line."""
    data = _read_file(path)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return parse_bytes(data, path, digest)


def parse_bytes(data: bytes, name: str, digest: str = "") -> Parsed:
    """The same for bytes in memory; ``name`` is for messages."""
    initrd_max = layout.RAM_LOW_END - 1
    if bzimage.is_bzimage(data[:0x206]):
        data, initrd_max = bzimage.unpack(data, name)
    if not data.startswith(b"\x7fELF"):
        raise ConfigError(f"{name}: not a kernel: neither an ELF vmlinux nor a bzImage")
    entry, segments = elf.read_segments(data, name)
    base, memory = _lay_out(data, segments, name)
    found = _VERSION.search(memory)
    return Parsed(
        digest=digest,
        version=found[1].decode("ascii") if found else "",
        features=sum(bit for bit, word in _WORDS if word in memory),
        entry=entry,
        base=base,
        end=max(segment.gpa + segment.memory for segment in segments),
        initrd_max=min(initrd_max, layout.RAM_LOW_END - 1),
        memory=memory,
        extents=find_extents(memory),
    )


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > _FILE_MAX:
                raise ConfigError(f"{path}: not a kernel: larger than {_FILE_MAX >> 30} GiB")
            return file.read(_FILE_MAX)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read kernel: {error.strerror}") from error


def _lay_out(data: bytes, segments: list[elf.Segment], name: str) -> tuple[int, bytearray]:
    base = segments[0].gpa & -PAGE
    end = max(segment.gpa + segment.size for segment in segments)
    if end - base > _SPAN_MAX:
        raise ConfigError(f"{name}: segments are more than {_SPAN_MAX >> 20} MiB apart")
    memory = bytearray((end - base + PAGE - 1) & -PAGE)
    for segment in segments:
        at = segment.gpa - base
        memory[at : at + segment.size] = data[segment.offset : segment.offset + segment.size]
    return base, memory


def find_extents(memory: bytearray) -> list[tuple[int, int]]:
    """(offset, length) of the parts that are not zero; both are multiples of the page."""
    found: list[tuple[int, int]] = []
    for page in _pages_in_use(memory):
        if found and page - sum(found[-1]) <= _GAP * PAGE:
            found[-1] = (found[-1][0], page + PAGE - found[-1][0])
        else:
            found.append((page, PAGE))
    return found


def _pages_in_use(memory: bytearray) -> list[int]:
    zero, zero_page = bytes(_SCAN), bytes(PAGE)
    pages: list[int] = []
    for start in range(0, len(memory), _SCAN):
        part = memory[start : start + _SCAN]
        if part != zero[: len(part)]:
            offsets = range(0, len(part), PAGE)
            pages += (start + at for at in offsets if part[at : at + PAGE] != zero_page)
    return pages


def store(parsed: Parsed, root: str, describe: Callable[[str, Parsed], str]) -> str:
    """Writes image and metadata into the cache at once or not at all; gives the folder's name."""
    content = parsed.digest
    os.makedirs(root, mode=0o700, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="new-", dir=root)
    try:
        with open(os.path.join(folder, "image"), "wb") as image:
            for offset, length in parsed.extents:
                image.seek(offset)
                image.write(parsed.memory[offset : offset + length])
            image.truncate(len(parsed.memory))
        with open(os.path.join(folder, "meta"), "w", encoding="utf-8") as meta:
            meta.write(describe(content, parsed))
        _publish(folder, os.path.join(root, content))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return content


def _publish(folder: str, target: str) -> None:
    """Moves a finished entry to its place, unless an equal one is there: others may use it."""
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _equal(folder, target):
            shutil.rmtree(target, ignore_errors=True)
            os.rename(folder, target)


def _equal(one: str, other: str) -> bool:
    try:
        return all(
            filecmp.cmp(os.path.join(one, name), os.path.join(other, name), shallow=False)
            for name in ("image", "meta")
        )
    except OSError:
        return False


def link(target: str, name: str) -> None:
    """Makes the symbolic link ``name``, in place of an older one."""
    temporary = f"{name}.{os.urandom(8).hex()}"
    os.symlink(target, temporary)
    os.replace(temporary, name)


def prune(root: str, keep: int) -> None:
    """Removes all but the newest ``keep`` images, and the links that lead nowhere.

    Others may be doing the same.
    """
    paths = [os.path.join(root, name) for name in os.listdir(root) if name != "by-stat"]
    paths.sort(key=_changed, reverse=True)
    for path in paths[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    links = os.path.join(root, "by-stat")
    for name in os.listdir(links):
        if not os.path.exists(os.path.join(links, name)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(links, name))


def _changed(path: str) -> float:
    """When it was changed last; 0 if it is gone."""
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0
