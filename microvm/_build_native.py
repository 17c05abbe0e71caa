"""Builds the compiled half: libmv.a and mv-vmm by native/Makefile, the guest's init by
rootfs/Makefile, then the cffi module.

The module `microvm._native_ext` is made in cffi's API mode.  Its cdef is *read* from the C
headers, never written a second time: the headers go through the C preprocessor, and what cffi
cannot know (values of macros and enumerators, array lengths, struct layouts) is replaced by
`...`, so that the C compiler fills it in.

Three ways in, one function (`build_extension`):
  python -m microvm._build_native [--sanitize]   in the tree (the Makefile does this)
  pip install -e .                               through the setuptools command `build_ext`
  pip wheel .                                    the same; mv-vmm and init go to microvm/bin/
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "native"
EXTENSION = "_native_ext.abi3.so"
_INCLUDES = [f"-I{NATIVE / 'include'}", f"-I{NATIVE}"]

# Header -> the declarations taken from it; None takes all of them. Order is that of #include.
HEADERS: dict[str, frozenset[str] | None] = {
    "asm/kvm.h": frozenset(
        {
            *("kvm_regs", "kvm_segment", "kvm_dtable", "kvm_sregs", "kvm_debugregs"),
            *("kvm_vcpu_events", "kvm_lapic_state", "kvm_msr_entry"),
        }
    ),
    "mv/layout.h": None,
    "mv/vcpu.h": frozenset(
        {
            *("mv_vcpu_state", "mv_exit", "mv_exit_info", "mv_vcpu_stats", "mv_dbt_options"),
            *("MV_MSRS_MAX", "MV_XSAVE_MAX"),
        }
    ),
    "mv/control.h": None,
    "mv/probe.h": None,
    "mv/testapi.h": None,
    "mv/silicon.h": None,
    "mv/features.h": None,
    "vcpu/dbt/insn.h": None,
    "vcpu/dbt/insn_row.h": frozenset({"mv_row_count"}),
}

_INCLUDE_LINES = "".join(f'#include "{header}"\n' for header in HEADERS)

_LINE_MARKER = re.compile(r'# \d+ "([^"]*)"')
_DEFINE = re.compile(r"#define (MV_\w+) (.+)")
# An integer constant expression: literals, operators, other macros and enumerators.
_INTEGER_EXPR = re.compile(r"[\w\s()<>+\-*/|&~]+")
_DECLARED = re.compile(r"(?:struct|union|enum)\s+(\w+)\s*\{|extern .*?(\w+)(?:\[.*\])?;")


def cdef_from_headers() -> str:
    """The declarations of HEADERS in the dialect that `FFI.cdef` accepts."""
    kernel_types = {"8": "char", "16": "short", "32": "int", "64": "long long"}
    typedefs = "".join(
        f"typedef signed {c} __s{bits};\ntypedef unsigned {c} __u{bits};\n"
        for bits, c in kernel_types.items()
    )
    return typedefs + "\n".join(_declarations(_preprocess()))


def _preprocess() -> str:
    command = [*_compiler(), "-E", "-dD", *_INCLUDES, "-x", "c", "-"]
    done = subprocess.run(
        command, input=_INCLUDE_LINES, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"cannot preprocess the native headers:\n{done.stderr}")
    return done.stdout


def _declarations(preprocessed: str) -> Iterator[str]:
    """Picks the wanted declarations, one at a time, and makes them fit for cdef."""
    for header, text in _by_header(preprocessed):
        wanted = HEADERS[header]
        for line in re.findall(r"^#define .*$", text, re.MULTILINE):
            macro = _DEFINE.fullmatch(line)
            if macro and _INTEGER_EXPR.fullmatch(macro[2]) and (not wanted or macro[1] in wanted):
                yield f"#define {macro[1]} ..."
        for declaration in _split(re.sub(r"^#.*$", "", text, flags=re.MULTILINE)):
            named = _DECLARED.match(declaration)
            if wanted is None or (named and (named[1] or named[2]) in wanted):
                yield _adapt(declaration)


def _by_header(preprocessed: str) -> Iterator[tuple[str, str]]:
    """Splits preprocessor output by the header that the text came from."""
    header: str | None = None
    lines: list[str] = []
    for line in preprocessed.splitlines():
        marker = _LINE_MARKER.match(line)
        if marker is None:
            lines.append(line)
            continue
        path = marker[1]
        source = next((h for h in HEADERS if path.endswith("/" + h)), None)
        if source != header:
            if header is not None:
                yield header, "\n".join(lines)
            header, lines = source, []
    if header is not None:
        yield header, "\n".join(lines)


def _split(text: str) -> Iterator[str]:
    """Top-level declarations, each to its `;`; function bodies and assertions are left out."""
    depth = start = 0
    for at, char in enumerate(text):
        if char in "{(":
            depth += 1
        elif char in "})":
            depth -= 1
        is_body_end = char == "}" and text[start:].lstrip().startswith("static inline")
        if depth == 0 and (char == ";" or is_body_end):
            declaration = " ".join(text[start : at + 1].split())
            start = at + 1
            if not declaration.startswith((";", "static inline", "_Static_assert")):
                yield declaration


def _adapt(declaration: str) -> str:
    declaration = re.sub(r"__attribute__\s*\(\(.*?\)\)", "", declaration)
    declaration = declaration.replace("__extension__", "").replace("_Bool", "bool")
    declaration = re.sub(r"\[\s*(?!\d+\s*\])[^\]]+\]", "[...]", declaration)
    if declaration.startswith("enum"):
        return re.sub(r"=[^,}]+", "= ...", declaration)
    if re.match(r"(struct|union)\s+\w+\s*\{", declaration):
        # Only the outermost: cffi asks the C compiler for this layout.
        return re.sub(r"\}\s*;$", "...; };", declaration)
    return declaration


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "cc"))


def _run(command: list[str]) -> None:
    # An outer make's job server is not ours.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS")}
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, env=env)
    if done.returncode:
        raise SystemExit(f"failed ({done.returncode}): {shlex.join(command)}")


def build_extension(target: Path, *, sanitize: bool = False) -> Path:
    """Builds native/ and links the extension module to `target`.

    Returns the directory with libmv.a and mv-vmm. Raises SystemExit, with the failed
    command, when a tool fails.
    """
    build = ROOT / "build" / ("native-asan" if sanitize else "native")
    make = f"make --no-print-directory -j {os.cpu_count() or 1} -C"
    _run([*shlex.split(make), str(ROOT / "rootfs")])
    _run([*shlex.split(make), str(NATIVE), *(["SAN=1"] if sanitize else [])])
    ffi = FFI()
    ffi.cdef(cdef_from_headers())
    ffi.set_source("microvm._native_ext", _INCLUDE_LINES)
    source = build / "_native_ext.c"
    ffi.emit_c_code(str(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    link = [*_compiler(), "-O1", "-g", "-shared", "-fPIC", "-pthread"]
    if sanitize:
        link += ["-fsanitize=address,undefined"]
    link += [f"-I{sysconfig.get_path('include')}", *_INCLUDES]
    link += ["-o", str(partial), str(source), str(build / "libmv.a")]
    _run(link)
    partial.replace(target)
    return build


try:
    from setuptools.command.build_ext import build_ext
    from setuptools.command.sdist import sdist
except ImportError:  # in-tree builds by the Makefile do not need setuptools
    pass
else:

    class BuildNative(build_ext):
        """`build_ext`: the extension module, and the programs as package data of a wheel."""

        def run(self) -> None:
            if self.inplace and os.environ.get("MICROVM_BUILD_LATER"):
                return  # the Makefile does it next, where its progress and its errors are seen
            build = build_extension(Path(self.get_ext_fullpath("microvm._native_ext")))
            if not self.inplace:
                package = Path(self.build_lib) / "microvm"
                shutil.copytree(ROOT / "kernel", package / "kernel", dirs_exist_ok=True)
                bindir = package / "bin"
                bindir.mkdir(parents=True, exist_ok=True)
                shutil.copy2(build / "mv-vmm", bindir / "mv-vmm")
                shutil.copy2(ROOT / "build" / "rootfs" / "init", bindir / "init")

        def get_ext_filename(self, fullname: str) -> str:
            return str(Path(*fullname.split(".")[:-1]) / EXTENSION)

    class SourceDist(sdist):
        """`sdist`: takes the sources that are not Python along."""

        def add_defaults(self) -> None:
            super().add_defaults()
            for folder in ("kernel", "native", "rootfs"):
                self.filelist.recursive_include(folder, "*")


if __name__ == "__main__":
    SANITIZE = "--sanitize" in sys.argv[1:]
    if SANITIZE:
        build_extension(ROOT / "build" / "native-asan" / EXTENSION, sanitize=True)
    else:
        build_extension(ROOT / "microvm" / EXTENSION)
