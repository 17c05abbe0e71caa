"""The guest's first root: the archive format, what is in it, and its cache."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from microvm.errors import ConfigError, HostError
from microvm.images import cpio, initramfs, rootfs
from microvm.images.module_file import module_info, strip_module
from microvm.images.skeleton import skeleton

# A static program as far as ELF headers tell: x86-64, one PT_LOAD.
STATIC = (
    b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    + b"\x02\0\x3e\0"
    + bytes(12)
    + (64).to_bytes(8, "little")
    + bytes(14)
    + b"\x38\0\x01\0"
    + bytes(6)
    + (1).to_bytes(4, "little")
    + bytes(52)
)
BUSYBOX = """#!/bin/sh
printf 'busybox\\nsh\\nls\\n'
"""


def unpack(archive: bytes) -> Iterator[tuple[str, int, bytes, list[int]]]:
    """(path, mode, content, all fields) of each entry, read as the kernel reads them."""
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701", f"no entry at {at}"
        fields = [int(archive[at + 6 + i * 8 : at + 14 + i * 8], 16) for i in range(13)]
        size, name_size = fields[6], fields[11]
        start = at + 110
        assert archive[start + name_size - 1] == 0
        name = archive[start : start + name_size].split(b"\0")[0].decode()
        if name == "TRAILER!!!":
            assert start + name_size == len(archive)
            return
        data = (start + name_size + 3) & -4
        yield name, fields[1], archive[data : data + size], fields
        at = (data + size + 3) & -4


def test_pack_entries_come_back() -> None:
    entries = [
        cpio.directory("d"),
        cpio.regular("d/f", b"12345", 0o600),
        cpio.symlink("l", "d/f"),
        cpio.character_device("c", 5, 1, 0o600),
        cpio.regular("empty", b""),
    ]
    found = [(path, mode, content) for path, mode, content, _ in unpack(cpio.pack(entries))]
    assert found == [
        ("d", stat.S_IFDIR | 0o755, b""),
        ("d/f", stat.S_IFREG | 0o600, b"12345"),
        ("l", stat.S_IFLNK | 0o777, b"d/f"),
        ("c", stat.S_IFCHR | 0o600, b""),
        ("empty", stat.S_IFREG | 0o644, b""),
    ]


def test_pack_is_pure_and_has_no_times() -> None:
    entries = [cpio.regular("f", b"x")]
    assert cpio.pack(entries) == cpio.pack(entries)
    ((*_, fields),) = unpack(cpio.pack(entries))
    assert fields[2:6] == [0, 0, 1, 0]  # uid, gid, nlink, mtime


def test_pack_device_numbers_stand_in_rdev() -> None:
    ((*_, fields),) = unpack(cpio.pack([cpio.character_device("c", 5, 1, 0o600)]))
    assert fields[7:11] == [0, 0, 5, 1]


@pytest.mark.parametrize("size", [0, 1, 3850, 3853, 3854, 3857, 4096, 100_000])
def test_pack_any_content_fills_whole_pages(size: int) -> None:
    archive = cpio.pack([cpio.regular("f", bytes(size))])
    assert len(archive) % 4096 == 0
    assert [content for _, _, content, _ in unpack(archive)] == [bytes(size)]


@pytest.mark.parametrize("path", ["", "/etc"])
def test_pack_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is no path"):
        cpio.pack([cpio.directory(path)])


def test_pack_is_read_by_cpio(tmp_path: Path) -> None:
    if not any(os.access(f"{folder}/cpio", os.X_OK) for folder in ("/bin", "/usr/bin")):
        pytest.skip("this host has no cpio program")
    done = subprocess.run(
        ["cpio", "-t", "--quiet"],
        input=cpio.pack([cpio.directory("d"), cpio.regular("d/f", b"1")]),
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"d\nd/f\n"


def test_skeleton_directories_come_before_their_content() -> None:
    seen = {""}
    for entry in skeleton():
        assert os.path.dirname(entry.path) in seen
        if stat.S_ISDIR(entry.mode):
            seen.add(entry.path)


def test_base_has_init_busybox_and_names() -> None:
    archive = rootfs.build_base(STATIC, Path("/bin/busybox").read_bytes())
    files = {path: (mode, content) for path, mode, content, _ in unpack(archive)}
    assert files["init"] == (stat.S_IFREG | 0o755, STATIC)
    assert files["bin/busybox"][0] == stat.S_IFREG | 0o755
    names = files["lib/microvm/applets"][1].decode().split("\n")
    assert {"sh", "ls", "true"} <= set(names)
    assert "busybox" not in names


def test_base_name_list_fits_init() -> None:
    """rootfs/applets.c reads at most 8191 bytes."""
    archive = rootfs.build_base(STATIC, Path("/bin/busybox").read_bytes())
    (names,) = [c for path, _, c, _ in unpack(archive) if path == "lib/microvm/applets"]
    assert len(names) < 8192


@pytest.mark.parametrize("program", [b"", b"#!/bin/sh\n", STATIC[:70]])
def test_base_program_not_static_is_refused(program: bytes) -> None:
    with pytest.raises(ConfigError, match="init is not a static"):
        rootfs.build_base(program, STATIC)


def test_is_static_tells_dynamic_programs() -> None:
    assert not rootfs.is_static(Path(sys.executable).read_bytes())
    assert rootfs.is_static(STATIC)


def module(**fields: str) -> bytes:
    """An ELF object with a .modinfo section, one that a kernel wants and two that it does not."""
    names = b"\0.modinfo\0.shstrtab\0.text\0.comment\0"
    info = b"".join(f"{key}={value}\0".encode() for key, value in fields.items())
    contents = [(names.index(b".modinfo"), 1, 2, info), (names.index(b".text"), 1, 6, b"CODE")]
    contents += [(names.index(b".comment"), 1, 0, b"COMMENT"), (10, 3, 0, names)]
    body, headers = b"", bytes(64)
    for name, kind, flags, content in contents:
        headers += struct.pack(
            "<IIQQQQIIQQ", name, kind, flags, 0, 64 + len(body), len(content), 0, 0, 1, 0
        )
        body += content
    fixed = (1, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, 5, 4)
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", *fixed)
    return head + body + headers + b"SIGNATURE~Module signature appended~\n"


def test_module_info_is_read() -> None:
    fields = module_info(module(depends="a,b", alias="fs-x"))
    assert fields == [("depends", "a,b"), ("alias", "fs-x")]


@pytest.mark.parametrize("damage", [b"", b"MZ", b"\x7fELF\x02\x01" + b"\xff" * 200, bytes(64)])
def test_module_damaged_is_told(damage: bytes) -> None:
    with pytest.raises(ConfigError, match=r"x\.ko: kernel module is damaged"):
        rootfs.build_modules([("x.ko", damage)])


def test_module_strip_keeps_what_kernel_reads() -> None:
    stripped = strip_module(module(depends="a", vermagic="6.1"))
    assert module_info(stripped) == [("depends", "a"), ("vermagic", "6.1")]
    assert b"CODE" in stripped
    assert b"COMMENT" not in stripped
    assert b"SIGNATURE" not in stripped


@pytest.mark.parametrize("odd", [b"", b"x" * 100, b"\x7fELF\x02\x01" + b"\xff" * 100])
def test_module_strip_leaves_what_it_does_not_know(odd: bytes) -> None:
    assert strip_module(odd) == odd


def test_modules_archive_boots_drivers_and_lists_the_rest() -> None:
    modules = [
        ("virtio_mmio.ko", module(vermagic="6.1-x SMP", depends="")),
        ("a.ko", module(vermagic="6.1-x SMP")),
        ("b.ko", module(vermagic="6.1-x SMP", depends="a")),
        ("virtio_blk.ko", module(vermagic="6.1-x SMP", depends="b")),
        ("over-lay.ko", module(vermagic="6.1-x SMP", depends="b,a", alias="fs-overlay")),
    ]
    files = {path: content for path, _, content, _ in unpack(rootfs.build_modules(modules))}
    folder = "lib/modules/6.1-x"
    boot = files["lib/microvm/modules.list"].decode().split()
    assert boot == [f"/{folder}/{name}.ko" for name in ("virtio_mmio", "a", "b", "virtio_blk")]
    assert b"over-lay.ko: b.ko a.ko\n" in files[f"{folder}/modules.dep"]
    assert files[f"{folder}/modules.alias"] == b"alias fs-overlay over_lay\n"
    assert files[f"{folder}/over-lay.ko"] == strip_module(modules[4][1])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and an init to build with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    init = tmp_path / "init"
    init.write_bytes(STATIC)
    monkeypatch.setattr(initramfs, "_INITS", (str(tmp_path / "absent"), str(init)))
    return tmp_path


def test_cache_second_call_builds_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = initramfs.base_initramfs()
    monkeypatch.setattr(rootfs, "build_base", None)
    assert initramfs.base_initramfs() == first
    assert Path(first).stat().st_size % 4096 == 0


def test_cache_new_init_is_seen(place: Path) -> None:
    first = Path(initramfs.base_initramfs()).read_bytes()
    (place / "init").write_bytes(STATIC + b"new")
    second = Path(initramfs.base_initramfs()).read_bytes()
    assert first != second
    assert STATIC + b"new" in second


def test_cache_lost_archive_is_built_again(place: Path) -> None:
    first = Path(initramfs.base_initramfs())
    first.resolve().unlink()
    assert Path(initramfs.base_initramfs()).exists()


def test_cache_keeps_a_bounded_number(place: Path) -> None:
    for number in range(initramfs._KEPT + 3):
        (place / "init").write_bytes(STATIC + b"%d" % number)
        initramfs.base_initramfs()
    archives = list((place / "cache/microvm/initramfs").glob("*.cpio"))
    links = list((place / "cache/microvm/initramfs/by-stat").iterdir())
    assert len(archives) == len(links) == initramfs._KEPT


def test_cache_not_writable_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "cache").write_text("a file, not a directory")
    with pytest.raises(HostError, match="cannot"):
        initramfs.base_initramfs()


def test_init_not_built_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initramfs, "_INITS", (str(place / "absent"),))
    with pytest.raises(HostError, match="make build"):
        initramfs.base_initramfs()


def test_modules_of_stored_kernel_are_packed(place: Path) -> None:
    folder = place / "kernel" / "modules"
    folder.mkdir(parents=True)
    (folder / "vsock.ko").write_bytes(module(vermagic="6.1 SMP"))
    (folder / "modules.list").write_text("vsock.ko\n")
    path = initramfs.modules_initramfs(str(place / "kernel" / "vmlinux"))
    assert path is not None
    files = {name: content for name, _, content, _ in unpack(Path(path).read_bytes())}
    assert "lib/modules/6.1/vsock.ko" in files


def test_modules_of_other_kernel_are_none(place: Path) -> None:
    assert initramfs.modules_initramfs(str(place / "vmlinux")) is None


def test_hot_path_imports_nothing_that_builds(place: Path) -> None:
    initramfs.base_initramfs()
    code = f"""
import sys
from microvm.images import initramfs
initramfs._INITS = ({str(place / "init")!r},)
initramfs.base_initramfs()
assert not {{"hashlib", "subprocess", "tempfile", "microvm.images.cpio"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
