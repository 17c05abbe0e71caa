"""Kernel files: what is read from good ones, and the one line that bad ones get."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_files import BANNER, COMPRESSED, MIB, Load, bzimage, elf

from microvm import layout
from microvm.boot import bzimage as bzimage_module
from microvm.boot import flat
from microvm.boot.kernel import ACPI, MMIO_CMDLINE, MPTABLE, Kernel, load_kernel
from microvm.errors import ConfigError, HostError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "microvm" / "kernels"


def load(tmp_path: Path, data: bytes, name: str = "kernel") -> Kernel:
    (tmp_path / name).write_bytes(data)
    return load_kernel(str(tmp_path / name))


def memory_of(kernel: Kernel) -> bytes:
    """What the extents of a kernel's image put into memory, from its base on."""
    memory = bytearray(kernel.end - kernel.base)
    with open(kernel.image, "rb") as image:
        for offset, length in kernel.extents:
            image.seek(offset)
            memory[offset : offset + length] = image.read(length)
    return bytes(memory)


# ---- good files --------------------------------------------------------------------------------


def test_elf_segments_are_placed_by_physical_address(tmp_path: Path) -> None:
    code, data = b"\xf4" * 5000, b"\x11" * 300
    loads = (Load(16 * MIB, code), Load(18 * MIB + 16, data, memsz=9000))
    kernel = load(tmp_path, elf(loads, 16 * MIB + 7))
    memory = memory_of(kernel)
    assert (kernel.entry, kernel.base, kernel.end) == (
        16 * MIB + 7,
        16 * MIB,
        18 * MIB + 16 + 9000,
    )
    assert memory[:5000] == code
    assert memory[2 * MIB + 16 : 2 * MIB + 316] == data
    assert memory.count(0) == len(memory) - 5300


def test_elf_long_zeroes_are_not_mapped(tmp_path: Path) -> None:
    kernel = load(tmp_path, elf((Load(16 * MIB, b"\1" + bytes(MIB) + b"\1"),)))
    assert kernel.extents == ((0, 4096), (MIB, 4096))


def test_elf_short_zeroes_do_not_split_a_mapping(tmp_path: Path) -> None:
    kernel = load(tmp_path, elf((Load(16 * MIB, b"\1" + bytes(8 * 4096) + b"\1"),)))
    assert kernel.extents == ((0, 9 * 4096),)


def test_elf_version_and_features_are_found_in_its_words(tmp_path: Path) -> None:
    words = BANNER + b"MPTABLE: no processors registered!\n\0Registering device virtio-mmio.%d\0"
    kernel = load(tmp_path, elf((Load(16 * MIB, words),)))
    assert kernel.version == "6.99.1-test"
    assert kernel.features == MPTABLE | MMIO_CMDLINE
    assert kernel.is_tuned
    kernel = load(tmp_path, elf((Load(16 * MIB, BANNER + b"ACPI: Interpreter enabled"),)), "other")
    assert kernel.features == ACPI
    assert not kernel.is_tuned


@pytest.mark.parametrize("method", COMPRESSED)
def test_bzimage_payload_of_each_compression_is_the_elf_file(tmp_path: Path, method: str) -> None:
    vmlinux = elf((Load(16 * MIB, os.urandom(3000) + BANNER),))
    plain = load(tmp_path, vmlinux, "vmlinux")
    packed = load(tmp_path, bzimage(COMPRESSED[method](vmlinux)), "bzImage")
    assert memory_of(packed) == memory_of(plain)
    assert packed.entry == plain.entry


def test_bzimage_lz4_of_several_blocks_is_joined(tmp_path: Path) -> None:
    vmlinux = elf((Load(16 * MIB, bytes(9 * MIB) + b"end"),))
    kernel = load(tmp_path, bzimage(COMPRESSED["lz4"](vmlinux)))
    assert memory_of(kernel).rstrip(b"\0").endswith(b"end")


def test_bzimage_setup_sects_of_zero_means_four(tmp_path: Path) -> None:
    kernel = load(tmp_path, bzimage(COMPRESSED["gzip"](elf()), setup_sects=0))
    assert kernel.version == "6.99.1-test"


def test_bzimage_limits_where_an_initrd_ends(tmp_path: Path) -> None:
    image = bzimage(COMPRESSED["gzip"](elf()), initrd_max=0x37FFFFFF)
    assert load(tmp_path, image).initrd_max == 0x37FFFFFF
    assert load(tmp_path, elf(), "vmlinux").initrd_max == layout.RAM_LOW_END - 1


# ---- the cache ---------------------------------------------------------------------------------


def test_cache_second_load_parses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(tmp_path, elf())
    monkeypatch.setattr(flat, "parse", lambda _path: pytest.fail("parsed again"))
    assert load_kernel(str(tmp_path / "kernel")) == first


def test_cache_changed_file_is_parsed_again(tmp_path: Path) -> None:
    before = load(tmp_path, elf((Load(16 * MIB, b"\xf4" + BANNER),)))
    after = load(tmp_path, elf((Load(16 * MIB, b"\xf4" + BANNER.replace(b"6.99", b"7.00")),)))
    assert (before.version, after.version) == ("6.99.1-test", "7.00.1-test")


@pytest.mark.parametrize("damage", ["meta", "image", "cut"])
def test_cache_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    kernel = load(tmp_path, elf())
    folder = Path(kernel.image).parent
    if damage == "cut":
        meta = folder / "meta"
        meta.write_text(meta.read_text()[:-5])
    else:
        (folder / damage).unlink()
    assert load_kernel(str(tmp_path / "kernel")) == kernel
    assert Path(kernel.image).stat().st_size == 4096


def test_cache_filled_by_many_at_once_serves_all(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "kernel").write_bytes(elf())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(load_kernel, [str(tmp_path / "kernel")] * 40))
    assert found == [found[0]] * 40
    assert len(list(cache.iterdir())) == 1 + 1
    assert len(list((cache / "by-stat").iterdir())) == 1


def test_cache_keeps_a_bounded_number_of_kernels(tmp_path: Path, cache: Path) -> None:
    for number in range(15):
        load(tmp_path, elf((Load(16 * MIB, b"\xf4%d" % number + BANNER),)), f"kernel{number}")
    assert len(list(cache.iterdir())) == 12 + 1
    assert len(list((cache / "by-stat").iterdir())) == 12


def test_cache_that_cannot_be_written_is_a_host_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(HostError, match="cannot write the kernel cache: Not a directory"):
        load(tmp_path, elf())


def test_cache_of_a_bad_kernel_holds_nothing(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, elf(entry=1))
    assert not cache.exists() or not list(cache.iterdir())


# ---- bad files: each gets one line that names the file -------------------------------------------

_TOP = 1 << 64
_WORDS = b"\xf4" * 64

BAD_ELF = {
    "empty": (b"", "neither an ELF vmlinux nor a bzImage"),
    "text": (b"#!/bin/sh\n", "neither an ELF vmlinux nor a bzImage"),
    "magic alone": (b"\x7fELF", "damaged ELF file"),
    "header cut": (elf()[:40], "damaged ELF file"),
    "program headers cut": (elf()[:80], "damaged ELF file"),
    "32-bit": (elf()[:4] + b"\1" + elf()[5:], "ELF file is not for x86-64|damaged ELF file"),
    "other machine": (elf(machine=183), "not for x86-64"),
    "object file": (elf(kind=1), "not executable"),
    "nothing to load": (elf((), 0), "nothing to load"),
    "filesz past the file": (
        elf((Load(16 * MIB, _WORDS, filesz=1 << 20),)),
        "ends past the end of the file",
    ),
    "offset past the file": (
        elf((Load(16 * MIB, _WORDS, offset=1 << 40),)),
        "ends past the end of the file",
    ),
    "offset wraps": (
        elf((Load(16 * MIB, _WORDS, offset=_TOP - 32),)),
        "ends past the end of the file",
    ),
    "filesz over memsz": (elf((Load(16 * MIB, _WORDS, memsz=8),)), "more bytes in the file"),
    "memory wraps": (elf((Load(_TOP - 4096, _WORDS, memsz=8192),)), "outside of RAM"),
    "memsz huge": (elf((Load(16 * MIB, _WORDS, memsz=_TOP - 1),)), "outside of RAM"),
    "above the hole": (elf((Load(1 << 32, _WORDS),)), "outside of RAM"),
    "over our tables": (elf((Load(layout.PML4_GPA, _WORDS),)), "below 1 MiB"),
    "below 1 MiB, reaching over": (elf((Load(MIB - 1, _WORDS),)), "below 1 MiB"),
    "overlap": (
        elf((Load(16 * MIB, _WORDS, memsz=4097), Load(16 * MIB + 4096, _WORDS))),
        "overlap",
    ),
    "same place": (elf((Load(16 * MIB, _WORDS), Load(16 * MIB, _WORDS))), "overlap"),
    "far apart": (elf((Load(16 * MIB, _WORDS), Load(2048 * MIB, _WORDS))), "MiB apart"),
    "entry before": (elf(entry=16 * MIB - 1), "entry point 0xffffff lies in no"),
    "entry behind": (elf((Load(16 * MIB, _WORDS),), 16 * MIB + 64), "entry point"),
    "entry in .bss": (elf((Load(16 * MIB, _WORDS, memsz=4096),), 16 * MIB + 100), "entry point"),
    "entry virtual": (elf(entry=0xFFFFFFFF81000000), "entry point"),
    "many segments": (elf(tuple(Load(16 * MIB, b"") for _ in range(65))), "more than 64 segments"),
}


@pytest.mark.parametrize("case", BAD_ELF)
def test_elf_that_is_bad_gets_one_clear_line(tmp_path: Path, case: str) -> None:
    data, message = BAD_ELF[case]
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, data)
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "kernel"))
    assert "\n" not in line and len(line) < 300


_GZIP = COMPRESSED["gzip"](elf())

BAD_BZIMAGE = {
    "header cut": (bzimage(_GZIP)[:0x240], "truncated in its setup header"),
    "setup_sects absurd": (bzimage(_GZIP)[:0x1F1] + b"\xff" + bzimage(_GZIP)[0x1F2:], "truncated"),
    "payload cut": (bzimage(_GZIP)[:-20], "truncated or damaged"),
    "payload offset absurd": (bzimage(_GZIP, length=len(_GZIP))[:-1], "truncated or damaged"),
    "payload length absurd": (bzimage(_GZIP, length=0xFFFFFFFF), "truncated or damaged"),
    "no payload": (bzimage(b"", length=0), "truncated or damaged"),
    "protocol too old": (bzimage(_GZIP, version=0x204), "boot protocol 2.04 is too old"),
    "32-bit": (bzimage(_GZIP, xloadflags=0), "not a 64-bit kernel"),
    "unknown compression": (bzimage(b"\x89LZO" + bytes(100)), r"unknown way \(it begins with 894c"),
    "no kernel inside": (bzimage(COMPRESSED["gzip"](b"hello")), "neither an ELF"),
}


@pytest.mark.parametrize("case", BAD_BZIMAGE)
def test_bzimage_that_is_bad_gets_one_clear_line(tmp_path: Path, case: str) -> None:
    data, message = BAD_BZIMAGE[case]
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, data)
    assert str(caught.value).startswith(str(tmp_path / "kernel"))


@pytest.mark.parametrize("method", [name for name in COMPRESSED if name != "none"])
def test_bzimage_payload_that_ends_early_is_damaged(tmp_path: Path, method: str) -> None:
    packed = COMPRESSED[method](elf((Load(16 * MIB, os.urandom(20000)),)))
    with pytest.raises(ConfigError, match=f"{method} payload is damaged|truncated|past the end"):
        load(tmp_path, bzimage(packed[:-9000]))


@pytest.mark.parametrize("method", [name for name in COMPRESSED if name != "none"])
def test_bzimage_payload_that_is_a_bomb_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(bzimage_module, "UNPACKED_MAX", 16 * MIB)
    with pytest.raises(ConfigError, match="unpacks to more than 16 MiB"):
        load(tmp_path, bzimage(COMPRESSED[method](bytes(40 * MIB))))


def test_kernel_that_is_missing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: cannot open kernel: No such file"):
        load_kernel(str(tmp_path / "nowhere"))


def test_kernel_that_is_a_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read kernel: Is a directory"):
        load_kernel(str(tmp_path))
