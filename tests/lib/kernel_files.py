"""Small kernel files, good and bad, for the tests of the loaders."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Sequence
from typing import NamedTuple

MIB = 1 << 20
BANNER = b"Linux version 6.99.1-test (somebody) #1\n\0"


class Load(NamedTuple):
    """A PT_LOAD segment. ``filesz``, ``memsz`` and ``offset`` follow from ``data`` unless given."""

    gpa: int
    data: bytes
    memsz: int | None = None
    filesz: int | None = None
    offset: int | None = None


def elf(
    loads: Sequence[Load] = (Load(16 * MIB, b"\xf4" + BANNER),),
    entry: int | None = None,
    *,
    machine: int = 62,
    kind: int = 2,
) -> bytes:
    """An ELF-64 file with these segments; entered at the first one's start unless told."""
    place = 64 + 56 * len(loads)
    headers, body = b"", b""
    for load in loads:
        offset = place + len(body) if load.offset is None else load.offset
        filesz = len(load.data) if load.filesz is None else load.filesz
        memsz = filesz if load.memsz is None else load.memsz
        headers += struct.pack("<IIQQQQQQ", 1, 7, offset, load.gpa, load.gpa, filesz, memsz, 4096)
        body += load.data
    start = loads[0].gpa if entry is None and loads else entry or 0
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    fields = (kind, machine, 1, start, 64, 0, 0, 64, 56, len(loads), 64, 0, 0)
    return ident + struct.pack("<HHIQQQIHHHHHH", *fields) + headers + body


def bzimage(
    payload: bytes,
    *,
    setup_sects: int = 3,
    version: int = 0x20F,
    offset: int = 64,
    length: int | None = None,
    xloadflags: int = 1,
    initrd_max: int = 0x7FFFFFFF,
) -> bytes:
    """A bzImage around a compressed payload."""
    setup = bytearray(((setup_sects or 4) + 1) * 512)
    setup[0x1F1] = setup_sects
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    struct.pack_into("<4sH", setup, 0x202, b"HdrS", version)
    setup[0x211] = 1
    struct.pack_into("<I", setup, 0x22C, initrd_max)
    struct.pack_into("<H", setup, 0x236, xloadflags)
    struct.pack_into("<II", setup, 0x248, offset, len(payload) if length is None else length)
    return bytes(setup) + bytes(offset) + payload


def _size(data: bytes) -> bytes:
    return struct.pack("<I", len(data))


def _lzma_alone(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_ALONE)


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def _lz4(data: bytes) -> bytes:
    import lz4.block

    packed = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 * MIB):
        block = lz4.block.compress(data[at : at + 8 * MIB], store_size=False)
        packed += struct.pack("<I", len(block)) + block
    return packed


#: As scripts/Makefile.lib does it: compressed, then the unpacked size in 4 bytes (gzip ends so).
COMPRESSED = {
    "none": lambda data: data,
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data) + _size(data),
    "lzma": lambda data: _lzma_alone(data) + _size(data),
    "zstd": lambda data: _zstd(data) + _size(data),
    "lz4": lambda data: _lz4(data) + _size(data),
    "bzip2": lambda data: bz2.compress(data) + _size(data),
}
