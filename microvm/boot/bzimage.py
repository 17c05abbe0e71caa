"""The compressed ``vmlinux`` inside a bzImage (Documentation/arch/x86/boot.rst).

A bzImage is a real-mode setup part of ``setup_sects`` + 1 sectors, then a 32-bit part which holds
the kernel's ELF file, compressed, at ``payload_offset``. The loader in the 32-bit part would
unpack and relocate it; we unpack it once on the host instead. Every number here is the file's and
is checked; what comes out is bounded.
"""

from __future__ import annotations

import bz2
import io
import lzma
import struct
import zlib
from collections.abc import Callable

from microvm.errors import ConfigError

#: What the decompressors raise.
_DAMAGE = (OSError, ValueError, EOFError, MemoryError, zlib.error, lzma.LZMAError)
#: No kernel is larger than this when unpacked, in bytes.
UNPACKED_MAX = 512 << 20

_SECTOR = 512
_HEADER_END = 0x268  # of the setup header up to init_size, protocol 2.10
_PROTOCOL_PAYLOAD = 0x208  # first with payload_offset and payload_length
_PROTOCOL_XLOADFLAGS = 0x20C
_LOADED_HIGH = 1
_KERNEL_64 = 1  # xloadflags: has a 64-bit entry
_LZ4_LEGACY_BLOCK = 8 << 20  # what one block unpacks to at most
_LZMA_MEMORY = 256 << 20  # dictionary that we are willing to allocate


def is_bzimage(head: bytes) -> bool:
    """Whether the first 0x206 bytes of a file are those of a Linux/x86 boot image."""
    return head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS"


def unpack(data: bytes, name: str) -> tuple[bytes, int]:
    """The ELF file inside a bzImage and the highest address its initrd may end at.

    ``data`` is the whole file, ``name`` is for messages. Raises ``ConfigError``.
    """
    if len(data) < _HEADER_END:
        raise ConfigError(f"{name}: bzImage is truncated in its setup header")
    version, loadflags = struct.unpack_from("<H", data, 0x206)[0], data[0x211]
    if version < _PROTOCOL_PAYLOAD or not loadflags & _LOADED_HIGH:
        raise ConfigError(
            f"{name}: boot protocol {version >> 8}.{version & 255:02} is too old: "
            "Linux 2.6.26 or newer is needed"
        )
    if version < _PROTOCOL_XLOADFLAGS or not struct.unpack_from("<H", data, 0x236)[0] & _KERNEL_64:
        raise ConfigError(f"{name}: not a 64-bit kernel")
    setup = ((data[0x1F1] or 4) + 1) * _SECTOR
    offset, length = struct.unpack_from("<II", data, 0x248)
    if length < 8 or setup + offset + length > len(data):
        raise ConfigError(
            f"{name}: bzImage is truncated or damaged: its payload would end at byte "
            f"{setup + offset + length} of {len(data)}"
        )
    payload = data[setup + offset : setup + offset + length]
    (initrd_max,) = struct.unpack_from("<I", data, 0x22C)
    return _decompress(payload, name), initrd_max


def _decompress(payload: bytes, name: str) -> bytes:
    if payload.startswith(b"\x7fELF"):
        return payload
    for magic, method, function in _METHODS:
        if payload.startswith(magic):
            try:
                vmlinux = function(payload)
            except _DAMAGE as error:
                raise ConfigError(
                    f"{name}: {method} payload is damaged: {str(error) or type(error).__name__}"
                ) from error
            break
    else:
        raise ConfigError(
            f"{name}: payload is compressed in an unknown way (it begins with {payload[:4].hex()}):"
            " gzip, xz, lzma, zstd, lz4 and bzip2 are known"
        )
    if len(vmlinux) > UNPACKED_MAX:
        raise ConfigError(f"{name}: payload unpacks to more than {UNPACKED_MAX >> 20} MiB")
    return vmlinux


def _gzip(payload: bytes) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    data = stream.decompress(payload, UNPACKED_MAX + 1)
    if not stream.eof and len(data) <= UNPACKED_MAX:
        raise EOFError("ends early")
    return data


def _xz(payload: bytes) -> bytes:
    return _with_eof(lzma.LZMADecompressor(memlimit=_LZMA_MEMORY), payload)


def _bzip2(payload: bytes) -> bytes:
    return _with_eof(bz2.BZ2Decompressor(), payload)


def _with_eof(stream: lzma.LZMADecompressor | bz2.BZ2Decompressor, payload: bytes) -> bytes:
    data = stream.decompress(payload, UNPACKED_MAX + 1)
    if not stream.eof and len(data) <= UNPACKED_MAX:
        raise EOFError("ends early")
    return data


def _lzma(payload: bytes) -> bytes:
    return _with_eof(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY), payload)


def _zstd(payload: bytes) -> bytes:
    import zstandard

    try:
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(payload))
        return reader.read(UNPACKED_MAX + 1)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _lz4(payload: bytes) -> bytes:
    """LZ4 legacy frames: a magic, then blocks, each with its compressed size before it."""
    import lz4.block

    unpacked = bytearray()
    end = len(payload) - 4  # the kernel's build appends the unpacked size
    position = 4
    while position < end:
        (size,) = struct.unpack_from("<I", payload, position)
        position += 4
        if not size or position + size > end:
            raise EOFError(f"block of {size} bytes at {position} of {end}")
        try:
            unpacked += lz4.block.decompress(
                payload[position : position + size], uncompressed_size=_LZ4_LEGACY_BLOCK
            )
        except lz4.block.LZ4BlockError as error:
            raise ValueError(str(error)) from error
        if len(unpacked) > UNPACKED_MAX:
            break
        position += size
    return bytes(unpacked)


_METHODS: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"\xfd7zXZ\0", "xz", _xz),
    (b"\x5d\0\0", "lzma", _lzma),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
    (b"\x02\x21\x4c\x18", "lz4", _lz4),
    (b"BZh", "bzip2", _bzip2),
)
