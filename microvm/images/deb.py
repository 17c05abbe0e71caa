"""Reads a Debian package: an ``ar`` archive that holds a compressed tar archive (deb(5)).

Nothing is ever extracted by a path that the package chose: callers ask for members by name and
get bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, BinaryIO, Protocol

from microvm.errors import ConfigError, HostError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAGIC = b"!<arch>\n"
_HEADER = 60  # bytes of a member's header: name 16, times and owner 32, size 10, end 2
_CHUNK = 1 << 20
#: What the readers of archives raise.
_DAMAGE = (
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    ValueError,
)
_UNPACKED_MAX = 4 << 30


@contextlib.contextmanager
def open_data(path: str) -> Iterator[tarfile.TarFile]:
    """The data archive of a package, unpacked into a temporary file, readable at random.

    Raises ``ConfigError`` if the package is damaged, ``HostError`` if the disk is full.
    """
    with open(path, "rb") as package, tempfile.TemporaryFile() as plain:
        name, size = _find_data(package, path)
        try:
            _unpack(package, size, name, plain)
            plain.seek(0)
            with tarfile.open(fileobj=plain, mode="r:") as archive:
                yield archive
        except _DAMAGE as error:
            raise ConfigError(f"{path}: damaged package: {error}") from error
        except OSError as error:
            raise HostError(f"{path}: cannot unpack: {error.strerror or error}") from error


def _find_data(package: BinaryIO, path: str) -> tuple[str, int]:
    """Name and size of the data member, the stream at its first byte."""
    if package.read(len(_MAGIC)) != _MAGIC:
        raise ConfigError(f"{path}: not a Debian package")
    while True:
        header = package.read(_HEADER)
        if len(header) < _HEADER or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
            raise ConfigError(f"{path}: damaged package: it has no data archive")
        name, size = header[:16].decode("ascii", "replace").rstrip(" /"), int(header[48:58])
        if name.startswith("data.tar"):
            return name, size
        package.seek(size + (size & 1), os.SEEK_CUR)


def _unpack(package: BinaryIO, size: int, name: str, plain: IO[bytes]) -> None:
    source = io.BufferedReader(_Part(package, size), _CHUNK)
    if name == "data.tar":
        shutil.copyfileobj(source, plain, _CHUNK)
    elif name == "data.tar.zst":
        import zstandard

        try:
            with zstandard.ZstdDecompressor().stream_reader(source) as reader:
                _copy(reader, plain)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
    elif name == "data.tar.xz":
        with lzma.open(source) as reader:
            _copy(reader, plain)
    else:
        with gzip.open(source) as reader:
            _copy(reader, plain)


def _copy(reader: _Readable, plain: IO[bytes]) -> None:
    total = 0
    while chunk := reader.read(_CHUNK):
        total += len(chunk)
        if total > _UNPACKED_MAX:
            raise ValueError(f"it unpacks to more than {_UNPACKED_MAX >> 30} GiB")
        plain.write(chunk)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Part(io.RawIOBase):
    """The next ``size`` bytes of a stream, as a stream."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._left = stream, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        data = self._stream.read(min(len(view), self._left))
        self._left -= len(data)
        view[: len(data)] = data
        return len(data)
