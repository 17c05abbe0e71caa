"""Reads a kernel module's facts, and takes out of it what a guest would only read, copy and check.

A distribution's module carries its types (``.BTF``, often more than half of the file), comments,
and a signature after the ELF file. In the guest each costs instructions at every boot: types are
parsed, and the check of one signature is a hash and an RSA operation. Nobody but us puts modules
into the guest's initramfs, so a signature proves nothing there; the kernel loads the module all the
same and notes the fact in its taint flags.

Sections keep their numbers, since symbols name them: one that goes becomes a null section.
ELF-64: System V ABI, gABI chapter 4; the modules' side: kernel/module/main.c.
"""

from __future__ import annotations

import struct

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_MAGIC = b"\x7fELF\x02\x01"
_ET_REL = 1
_SHT_NULL, _SHT_SYMTAB, _SHT_STRTAB, _SHT_RELA, _SHT_NOBITS = 0, 2, 3, 4, 8
_SHF_ALLOC = 2
_NULL = (0,) * 10
_ALIGN_MAX = 4096


def strip_module(module: bytes) -> bytes:
    """The module without signature, types, notes and comments; as it is if it is not understood."""
    if len(module) < _EHDR.size or not module.startswith(_MAGIC):
        return module
    header = list(_EHDR.unpack_from(module))
    offset, size, count = header[6], header[11], header[12]
    if header[1] != _ET_REL or size != _SHDR.size or offset + size * count > len(module):
        return module
    sections = [_SHDR.unpack_from(module, offset + i * size) for i in range(count)]
    if not all(_is_sane(section, len(module)) for section in sections):
        return module
    out = bytearray(_EHDR.size)
    kept = [_keep(section, sections, module, out) for section in sections]
    out += bytes(-len(out) % 8)
    header[6] = len(out)
    for section in kept:
        out += _SHDR.pack(*section)
    _EHDR.pack_into(out, 0, *header)
    return bytes(out)


def module_info(module: bytes) -> list[tuple[str, str]]:
    """(key, value) of all fields in ``.modinfo``: depends, alias, vermagic, ...

    Raises ``ValueError`` if it is no module.
    """
    if len(module) < _EHDR.size or not module.startswith(_MAGIC):
        raise ValueError("not an ELF file")
    header = _EHDR.unpack_from(module)
    offset, count, names = header[6], header[12], header[13]
    if offset + _SHDR.size * count > len(module) or names >= count:
        raise ValueError("its section headers lie outside of it")
    sections = [_SHDR.unpack_from(module, offset + i * _SHDR.size) for i in range(count)]
    for section in sections:
        start = sections[names][4] + section[0]
        if module[start : start + 9] == b".modinfo\0":
            text = module[section[4] : section[4] + section[5]].decode("ascii", "replace")
            pairs = (field.partition("=") for field in text.split("\0") if "=" in field)
            return [(key, value) for key, _, value in pairs]
    raise ValueError("it has no .modinfo section")


def _is_sane(section: tuple[int, ...], file_size: int) -> bool:
    _, kind, _, _, offset, size, _, _, align, _ = section
    inside = kind in (_SHT_NULL, _SHT_NOBITS) or offset + size <= file_size
    return inside and align <= _ALIGN_MAX and not align & (align - 1)


def _keep(
    section: tuple[int, ...], sections: list[tuple[int, ...]], module: bytes, out: bytearray
) -> tuple[int, ...]:
    """Appends the section's bytes to ``out``; its new header."""
    name, kind, flags, address, offset, size, link, info, align, entry = section
    if not _is_needed(section, sections):
        return _NULL
    if kind != _SHT_NOBITS:
        out += bytes(-len(out) % max(align, 1))
        content = module[offset : offset + size]
        offset = len(out)
        out += content
    return (name, kind, flags, address, offset, size, link, info, align, entry)


def _is_needed(section: tuple[int, ...], sections: list[tuple[int, ...]]) -> bool:
    kind, flags, info = section[1], section[2], section[7]
    if kind == _SHT_RELA:
        return info < len(sections) and bool(sections[info][2] & _SHF_ALLOC)
    return kind in (_SHT_SYMTAB, _SHT_STRTAB) or bool(flags & _SHF_ALLOC)
