"""The store of kernels, packages, modules and the configuration of our own kernel."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import shutil
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import zstandard
from kernel_files import COMPRESSED, MIB, Load, bzimage, elf

from microvm.errors import ConfigError, HostError
from microvm.images import build, deb, install, kernels, pull
from microvm.images.modules import Module, ModuleArchive, ModuleTree, select_modules

needs_tools = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in build._TOOLS),
    reason="tools of a kernel build are missing",
)


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "microvm" / "kernels"


def add(name: str, origin: str, age: int = 0) -> kernels.StoredKernel:
    stored = install.install(name, origin, {"vmlinux": elf()})
    folder = os.path.dirname(stored.path)
    now = os.stat(folder).st_mtime
    os.utime(folder, (now - age, now - age))
    return stored


# ---- store -------------------------------------------------------------------------------------


def test_store_empty_says_what_to_do() -> None:
    assert kernels.list_kernels() == []
    with pytest.raises(ConfigError, match="no guest kernel yet: run `microvm kernel pull`"):
        kernels.find_kernel()


def test_store_default_is_built_then_pulled_then_host() -> None:
    add("mine", kernels.IMPORTED)
    with pytest.raises(ConfigError, match="no guest kernel yet"):
        kernels.default_kernel()
    for origin in (kernels.HOST, kernels.PULLED, kernels.BUILT):
        stored = add(f"of-{origin}", origin)
        assert kernels.find_kernel() == stored.path
    names = [(kernel.name, kernel.is_default) for kernel in kernels.list_kernels()]
    assert names == [
        ("of-built", True),
        ("of-pulled", False),
        ("of-host", False),
        ("mine", False),
    ]


def test_store_newest_of_an_origin_comes_first() -> None:
    add("old", kernels.PULLED, age=100)
    add("new", kernels.PULLED)
    add("older", kernels.PULLED, age=200)
    assert [kernel.name for kernel in kernels.list_kernels()] == ["new", "old", "older"]


def test_store_find_takes_names_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = add("6.99", kernels.IMPORTED)
    assert kernels.find_kernel("6.99") == stored.path
    assert kernels.find_kernel("./nowhere") == "./nowhere"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vmlinux").write_bytes(b"")
    assert kernels.find_kernel("vmlinux") == "vmlinux"
    with pytest.raises(ConfigError, match=r"kernel '7.0' is neither .* \(there: 6.99\)"):
        kernels.find_kernel("7.0")


@pytest.mark.parametrize("name", ["..", ".new-x", ""])
def test_store_names_that_lead_out_are_not_found(name: str) -> None:
    add("6.99", kernels.BUILT)
    with pytest.raises(ConfigError):
        kernels.remove_kernel(name)
    with pytest.raises(ConfigError, match="use letters"):
        install.install(name, kernels.IMPORTED, {"vmlinux": elf()})


def test_store_remove_takes_the_whole_kernel(homes: Path) -> None:
    add("a", kernels.PULLED)
    add("b", kernels.PULLED)
    assert kernels.remove_kernel("a").name == "a"
    assert [kernel.name for kernel in kernels.list_kernels()] == ["b"]
    with pytest.raises(ConfigError, match="'a' is not in the store"):
        kernels.remove_kernel("a")


def test_store_import_copies_file_and_modules(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(bzimage(COMPRESSED["xz"](elf())))
    tree = write_tree(tmp_path / "modules", {"virtio_mmio.ko": module()})
    stored = kernels.import_kernel(str(tmp_path / "bzImage"), modules=str(tree))
    assert (stored.name, stored.origin) == ("6.99.1-test", kernels.IMPORTED)
    assert os.path.basename(stored.path) == "vmlinuz"
    assert [os.path.basename(path) for path in kernels.modules_for(stored.path)] == [
        "virtio_mmio.ko"
    ]
    assert kernels.import_kernel(str(tmp_path / "bzImage"), "mine").name == "mine"


def test_store_of_a_bad_kernel_keeps_the_old_one(homes: Path) -> None:
    add("same", kernels.IMPORTED)
    with pytest.raises(ConfigError):
        install.install("same", kernels.IMPORTED, {"vmlinux": b"no kernel"})
    assert os.listdir(homes / "imported") == ["same"]
    assert (homes / "imported" / "same" / "vmlinux").read_bytes() == elf()


def test_store_modules_of_a_loose_file_are_none(tmp_path: Path) -> None:
    assert kernels.modules_for(str(tmp_path / "vmlinux")) == ()


# ---- modules -----------------------------------------------------------------------------------


def module(depends: str = "", softdep: str = "") -> bytes:
    """An object file with a .modinfo section."""
    info = b"license=GPL\0depends=" + depends.encode() + b"\0"
    if softdep:
        info += b"softdep=" + softdep.encode() + b"\0"
    names = b"\0.modinfo\0.shstrtab\0"
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    place = 64 + len(info) + len(names)
    header = struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, place, 0, 64, 0, 0, 64, 3, 2)

    def section(name: int, kind: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)

    sections = bytes(64) + section(1, 1, 64, len(info))
    sections += section(10, 3, 64 + len(info), len(names))
    return ident + header + info + names + sections


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def select(root: Path, files: dict[str, bytes], wanted: Iterable[str]) -> list[str]:
    tree = ModuleTree(str(write_tree(root, files)))
    return [module.name for module in select_modules(tree, wanted)]


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    files = {
        "kernel/net/a.ko": module("b-c,d"),
        "kernel/net/b-c.ko": module("d"),
        "kernel/lib/d.ko": module(),
        "kernel/lib/other.ko": module(),
    }
    assert select(tmp_path, files, ["a", "d"]) == ["d", "b_c", "a"]


def test_modules_that_are_built_in_or_absent_are_left_out(tmp_path: Path) -> None:
    files = {"a.ko": module("inside"), "modules.builtin": b"kernel/inside.ko\n"}
    assert select(tmp_path, files, ["a", "inside", "absent"]) == ["a"]


def test_modules_soft_dependencies_are_taken_if_there(tmp_path: Path) -> None:
    files = {"a.ko": module("", "pre: crc absent"), "crc.ko": module()}
    assert select(tmp_path, files, ["a"]) == ["crc", "a"]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".ko.xz", lzma.compress),
        (".ko.gz", gzip.compress),
        (".ko.zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_modules_are_unpacked(tmp_path: Path, suffix: str, pack: object) -> None:
    assert callable(pack)
    tree = ModuleTree(str(write_tree(tmp_path, {f"a{suffix}": pack(module())})))
    assert select_modules(tree, ["a"]) == [Module(name="a", data=module())]


def test_modules_missing_dependency_says_whose(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kernel module a needs b, which is not there"):
        select(tmp_path, {"a.ko": module("b")}, ["a"])


def test_modules_in_a_circle_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kernel module b needs a"):
        select(tmp_path, {"a.ko": module("b"), "b.ko": module("a")}, ["a"])


@pytest.mark.parametrize("name", ["a.ko", "a.ko.xz", "a.ko.gz", "a.ko.zst"])
def test_modules_damaged_say_which(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: kernel module is damaged"):
        select(tmp_path, {name: b"\xfd7zXZ\0 and so on"}, ["a"])


# ---- packages ----------------------------------------------------------------------------------


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def package(data: bytes, name: str = "data.tar.xz") -> bytes:
    """A .deb: ar members debian-binary, control.tar and the data."""
    whole = b"!<arch>\n"
    for member, content in (("debian-binary", b"2.0\n"), ("control.tar", b"odd"), (name, data)):
        whole += f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        whole += content + b"\n" * (len(content) & 1)
    return whole


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("data.tar", bytes),
        ("data.tar.gz", gzip.compress),
        ("data.tar.xz", lzma.compress),
        ("data.tar.zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_deb_data_of_each_compression_is_read(tmp_path: Path, name: str, pack: object) -> None:
    assert callable(pack)
    (tmp_path / "a.deb").write_bytes(package(pack(tar({"./lib/x.ko": b"hello"})), name))
    with deb.open_data(str(tmp_path / "a.deb")) as archive:
        source = ModuleArchive(archive)
        assert source.read("./lib/x.ko") == b"hello"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a Debian package"),
        (b"!<arch>\n", "no data archive"),
        (package(lzma.compress(tar({"a": b"b"})))[:150], "no data archive|damaged package"),
        (package(b"garbage"), "damaged package"),
        (package(b"garbage", "data.tar.zst"), "damaged package"),
        (package(b"garbage", "data.tar.gz"), "damaged package"),
        (package(lzma.compress(tar({"a": b"b" * 9999}))[:-40]), "damaged package"),
    ],
)
def test_deb_that_is_damaged_gets_one_clear_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught, deb.open_data(str(path)):
        pass
    assert str(caught.value).startswith(f"{path}: ")


# ---- pull --------------------------------------------------------------------------------------

_DEBIAN = [
    "linux-image-6.1.0-56-cloud-amd64",
    "linux-image-6.1.0-9-cloud-amd64",
    "linux-image-6.1.0-56-amd64",
    "linux-image-6.12.9+deb12-cloud-amd64",
    "linux-image-6.12.117+deb12-cloud-amd64",
    "linux-image-cloud-amd64",
    "linux-image-6.12.117+deb12-amd64",
    "linux-image-6.12.117+deb12-rt-amd64",
    "linux-image-6.12-cloud-amd64",
    "linux-image-6.12.117+deb12-cloud-amd64-unsigned",
    "linux-image-6.12.117+deb12-cloud-amd64-dbg",
    "linux-image-amd64",
    "linux-image-6.1-amd64-signed-template",
]
_UBUNTU = ["linux-image-6.8.0-31-generic", "linux-image-6.8.0-45-generic", "linux-image-generic"]


@pytest.mark.parametrize(
    ("names", "version", "release"),
    [
        (_DEBIAN, None, "6.12.117+deb12-cloud-amd64"),
        (_DEBIAN, "6.12", "6.12.117+deb12-cloud-amd64"),
        (_DEBIAN, "6.1", "6.1.0-56-cloud-amd64"),
        (_DEBIAN, "6.12.9", "6.12.9+deb12-cloud-amd64"),
        (_DEBIAN, "6.1.0-56-amd64", "6.1.0-56-amd64"),
        (_UBUNTU, None, "6.8.0-45-generic"),
    ],
)
def test_pull_chooses_the_newest_of_the_best_flavour(
    names: list[str], version: str | None, release: str
) -> None:
    assert pull.choose(pull.parse_candidates(names), version).release == release


def test_pull_of_a_version_that_is_not_offered_says_what_is() -> None:
    with pytest.raises(ConfigError, match=r"no kernel 5.10 \(versions there are: 6.1, 6.12\)"):
        pull.choose(pull.parse_candidates(_DEBIAN), "5.10")
    with pytest.raises(ConfigError, match="run `apt-get update` as root first"):
        pull.choose([], None)


def fake_apt(folder: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], script: str) -> None:
    """Puts apt-cache and apt-get of ours before the host's."""
    folder.mkdir()
    (folder / "apt-cache").write_text("#!/bin/sh\necho " + " ".join(names))
    (folder / "apt-get").write_text("#!/bin/sh\n" + script)
    for tool in folder.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


_RELEASE = "6.12.1+deb12-cloud-amd64"


def test_pull_stores_kernel_configuration_and_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"./lib/modules/{_RELEASE}"
    files = {
        f"./boot/vmlinuz-{_RELEASE}": bzimage(COMPRESSED["zstd"](elf())),
        f"./boot/config-{_RELEASE}": b"CONFIG_SMP=y\n",
        f"{root}/kernel/net/vmw_vsock_virtio_transport.ko.xz": lzma.compress(module("vsock")),
        f"{root}/kernel/net/vsock.ko.xz": lzma.compress(module()),
        f"{root}/kernel/drivers/other.ko.xz": b"",
    }
    (tmp_path / "a.deb").write_bytes(package(lzma.compress(tar(files))))
    script = f"cp {tmp_path}/a.deb linux-image-{_RELEASE}_1_amd64.deb"
    fake_apt(tmp_path / "bin", monkeypatch, [f"linux-image-{_RELEASE}"], script)
    steps: list[tuple[str, int, int]] = []
    stored = pull.pull_kernel(progress=lambda *step: steps.append(step))
    assert (stored.name, stored.origin) == (_RELEASE, kernels.PULLED)
    assert kernels.find_kernel() == stored.path
    assert [os.path.basename(path) for path in kernels.modules_for(stored.path)] == [
        "vsock.ko",
        "vmw_vsock_virtio_transport.ko",
    ]
    assert Path(stored.path).with_name("config").read_bytes() == b"CONFIG_SMP=y\n"
    assert steps[-1] == ("storing", 1, 1)


def test_pull_that_apt_refuses_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "echo 'W: odd' >&2; echo 'E: No space left' >&2; exit 100"
    fake_apt(tmp_path / "bin", monkeypatch, [f"linux-image-{_RELEASE}"], script)
    with pytest.raises(HostError, match=r"-cloud-amd64 failed: No space left"):
        pull.pull_kernel()


def release(version: str) -> bytes:
    return elf((Load(16 * MIB, f"Linux version {version} (x)\0".encode()),))


def test_pull_without_apt_copies_the_hosts_kernel(tmp_path: Path) -> None:
    boot = {"vmlinuz-6.9.1": release("6.9.1"), "vmlinuz-6.10.2": release("6.10.2")}
    write_tree(tmp_path / "boot", boot | {"config-6.10.2": b"CONFIG_SMP=y\n"})
    write_tree(tmp_path / "lib/modules/6.10.2", {"kernel/virtio_mmio.ko": module()})
    stored = pull.copy_host_kernel(root=str(tmp_path))
    assert (stored.name, stored.origin) == ("6.10.2", kernels.HOST)
    assert len(kernels.modules_for(stored.path)) == 1
    assert pull.copy_host_kernel("6.9", root=str(tmp_path)).name == "6.9.1"
    with pytest.raises(ConfigError, match=r"boot/vmlinuz-5.4\*: no such kernel"):
        pull.copy_host_kernel("5.4", root=str(tmp_path))


def test_pull_without_apt_finds_modules_by_the_version_in_the_image(tmp_path: Path) -> None:
    write_tree(tmp_path / "boot", {"vmlinuz-linux": release("6.10.2-arch1")})
    write_tree(tmp_path / "lib/modules/6.10.2-arch1", {"kernel/virtio_mmio.ko": module()})
    stored = pull.copy_host_kernel(root=str(tmp_path))
    assert stored.name == "6.10.2-arch1"
    assert len(kernels.modules_for(stored.path)) == 1


def test_pull_without_apt_prefers_the_image_beside_the_modules(tmp_path: Path) -> None:
    write_tree(tmp_path / "boot", {"vmlinuz-6.10.2": b"not readable, say"})
    write_tree(tmp_path / "lib/modules/6.10.2", {"vmlinuz": release("6.10.2")})
    assert pull.copy_host_kernel(root=str(tmp_path)).name == "6.10.2"


# ---- build -------------------------------------------------------------------------------------


def fragments(tmp_path: Path, text: str) -> Path:
    (tmp_path / "a.config").write_text(text)
    return tmp_path


def test_fragments_lines_may_be_limited_to_versions(tmp_path: Path) -> None:
    folder = str(
        fragments(
            tmp_path,
            "# comment\n"
            'CONFIG_NAME="a b"  # a reason\n'
            "CONFIG_NEW=y # [>=6.10] since then\n"
            "CONFIG_OLD=y # [<6.10] until then\n",
        )
    )
    assert build.read_fragments(folder, (6, 12, 1)) == {
        "CONFIG_NAME": '"a b"',
        "CONFIG_NEW": "y",
    }
    assert build.read_fragments(folder, (6, 9, 1)) == {"CONFIG_NAME": '"a b"', "CONFIG_OLD": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CONFIG_A=y\n", "a.config:1: write CONFIG_X=value  # reason"),
        ("CONFIG_A=y #\n", "a.config:1: write"),
        ("CONFIG_A=y # one\n\nCONFIG_A=n # two\n", "a.config:3: CONFIG_A is named twice"),
    ],
)
def test_fragments_that_are_wrong_say_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build.read_fragments(str(fragments(tmp_path, text)), (6, 12))


def test_fragments_of_ours_are_well_formed() -> None:
    wanted = build.read_fragments(build.fragment_dir(), (6, 12, 0))
    assert wanted["CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES"] == "y"
    assert wanted["CONFIG_PCI"] == wanted["CONFIG_ACPI"] == wanted["CONFIG_MODULES"] == "n"


def test_lost_lines_are_those_that_kconfig_changed() -> None:
    wanted = {"CONFIG_A": "y", "CONFIG_B": "n", "CONFIG_C": "y", "CONFIG_D": "n", "CONFIG_E": "2"}
    config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=y\nCONFIG_E=3\n"
    assert build.lost_lines(wanted, config) == [
        "CONFIG_C=y (is n)",
        "CONFIG_D=n (is y)",
        "CONFIG_E=2 (is 3)",
    ]


def test_source_package_is_the_newest_that_will_do() -> None:
    names = ["linux-source-5.10", "linux-source-6.1", "linux-source-6.12", "linux-source"]
    assert build.newest_source_of(names) == "linux-source-6.12"
    with pytest.raises(ConfigError, match=r"no linux-source package of 6\.1 or newer"):
        build.newest_source_of(names[:1])


# A source whose Makefile answers as the kernel's does; the kernel that it "builds" lies beside it.
_MAKEFILE = """
VERSION = 6
PATCHLEVEL = 12
SUBLEVEL = 1

allnoconfig:
\t@cp $(KCONFIG_ALLCONFIG) $(O)/.config

vmlinux:
\t@echo "  CC      a.o"
\t@cp vmlinux.bin $(O)/vmlinux
\t@mkdir -p $(O)/include/config
\t@echo 6.12.1-microvm > $(O)/include/config/kernel.release
"""


def fake_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, makefile: str) -> None:
    top = "linux-source-6.12"
    source = tar({f"{top}/Makefile": makefile.encode(), f"{top}/vmlinux.bin": elf()})
    data = tar({f"./usr/src/{top}.tar.xz": lzma.compress(source)})
    (tmp_path / "source.deb").write_bytes(package(lzma.compress(data)))
    script = f"cp {tmp_path}/source.deb {top}_6.12.1-1_all.deb"
    fake_apt(tmp_path / "bin", monkeypatch, [top], script)
    monkeypatch.setattr(build, "_HEADERS", {})


@needs_tools
def test_build_stores_the_kernel_as_default_and_builds_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_source(tmp_path, monkeypatch, _MAKEFILE)
    add("stock", kernels.PULLED)
    steps: list[str] = []
    stored = build.build_kernel(lambda what, _done, _total: steps.append(what))
    assert (stored.name, stored.origin) == ("6.12.1-microvm", kernels.BUILT)
    assert kernels.find_kernel() == stored.path
    assert "CONFIG_SMP=y" in Path(stored.path).with_name("config").read_text()
    assert "compiling" in steps
    steps.clear()
    assert build.build_kernel(lambda what, _done, _total: steps.append(what)).path == stored.path
    assert steps == []


@needs_tools
def test_build_that_fails_gives_the_first_error_and_where_the_rest_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = _MAKEFILE.replace("@cp vmlinux.bin", "@echo a.c:1: error: oh >&2; false")
    fake_source(tmp_path, monkeypatch, broken)
    with pytest.raises(HostError, match=r"kernel build failed: a.c:1: error: oh .*build\.log\)$"):
        build.build_kernel()
    assert kernels.list_kernels() == []


@needs_tools
def test_build_with_a_line_that_kconfig_drops_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping = _MAKEFILE.replace(
        "@cp $(KCONFIG_ALLCONFIG)", "@grep -v _SMP= $(KCONFIG_ALLCONFIG) >"
    )
    fake_source(tmp_path, monkeypatch, dropping)
    with pytest.raises(ConfigError, match=r"Kconfig did not keep CONFIG_SMP=y \(is n\)"):
        build.build_kernel()


def test_build_without_tools_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"without make, gcc, binutils, .*run `apt-get"):
        build.build_kernel()
