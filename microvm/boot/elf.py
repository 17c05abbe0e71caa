"""Reads the program headers of a kernel's ELF file, trusting none of them.

A kernel is loaded by physical address: each PT_LOAD's ``p_filesz`` bytes go to ``p_paddr``, the
rest of its ``p_memsz`` is zero, which RAM is anyway. Its entry point is physical too.
"""

from __future__ import annotations

import io
import itertools

from microvm import layout
from microvm._record import Record
from microvm.errors import ConfigError

_SEGMENTS_MAX = 64  # a vmlinux has three to five
_PAGE = 4096


class Segment(Record):
    """``size`` bytes at ``offset`` of the file go to guest address ``gpa``; it spans ``memory``."""

    gpa: int
    offset: int
    size: int
    memory: int


def read_segments(data: bytes, name: str) -> tuple[int, list[Segment]]:
    """Entry point and loaded segments, sorted by address, disjoint, in RAM's first part.

    ``data`` is the whole file, ``name`` is for messages. Raises ``ConfigError``.
    """
    entry, segments = _parse(data, name)
    if not segments:
        raise ConfigError(f"{name}: ELF file has nothing to load (no PT_LOAD segment)")
    segments.sort(key=lambda segment: segment.gpa)
    for segment in segments:
        _check(segment, len(data), name)
    for below, above in itertools.pairwise(segments):
        if below.gpa + below.memory > above.gpa:
            raise ConfigError(f"{name}: segments at {below.gpa:#x} and {above.gpa:#x} overlap")
    if not any(s.gpa <= entry < s.gpa + s.size for s in segments):
        raise ConfigError(f"{name}: entry point {entry:#x} lies in no loaded segment")
    return entry, segments


def _check(segment: Segment, file_size: int, name: str) -> None:
    where = f"{name}: segment at {segment.gpa:#x}"
    if segment.size > segment.memory:
        raise ConfigError(f"{where} has more bytes in the file than in memory")
    if segment.offset + segment.size > file_size:
        raise ConfigError(f"{where} ends past the end of the file: it is truncated")
    if segment.gpa < layout.HIGH_RAM_GPA:
        raise ConfigError(f"{where} lies below 1 MiB: this is not a Linux kernel")
    if segment.gpa + segment.memory > layout.RAM_LOW_END:
        raise ConfigError(f"{where} ends above {layout.RAM_LOW_END:#x}, outside of RAM")


def _parse(data: bytes, name: str) -> tuple[int, list[Segment]]:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        elf = ELFFile(io.BytesIO(data))
        kind = elf["e_machine"], elf["e_type"], elf.elfclass, elf.little_endian
        if elf.num_segments() > _SEGMENTS_MAX:
            raise ConfigError(f"{name}: ELF file has more than {_SEGMENTS_MAX} segments")
        headers = [segment.header for segment in elf.iter_segments("PT_LOAD")]
        entry: int = elf["e_entry"]
    except ConfigError:
        raise
    except ELFError as error:
        raise ConfigError(f"{name}: damaged ELF file: {error}") from error
    except Exception as error:  # a parser that was not written for hostile files may raise anything
        raise ConfigError(f"{name}: damaged ELF file ({type(error).__name__})") from error
    if kind[0] != "EM_X86_64" or kind[2] != 64 or not kind[3]:
        raise ConfigError(f"{name}: ELF file is not for x86-64")
    if kind[1] not in ("ET_EXEC", "ET_DYN"):
        raise ConfigError(f"{name}: ELF file is not executable: a linked vmlinux is needed")
    segments = [
        Segment(gpa=h["p_paddr"], offset=h["p_offset"], size=h["p_filesz"], memory=h["p_memsz"])
        for h in headers
        if h["p_memsz"] or h["p_filesz"]
    ]
    return entry, segments
