"""Who may know whom: the imports and #includes of every room, held to ARCHITECTURE.md.

Only what happens at run time counts: imports under TYPE_CHECKING are names for the reader. When a
test here fails, either the new arrow is wrong, or the tables below and ARCHITECTURE.md change
with it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "microvm"

#: These know only each other; everybody may use them.
GROUND = frozenset({"_record", "_signals", "dirs", "errors", "layout"})

#: Room -> rooms that it may import, beside the ground and itself.
MAY_IMPORT: dict[str, frozenset[str]] = {
    **{room: frozenset() for room in GROUND},
    "config": frozenset(),
    "control": frozenset(),
    "session": frozenset(),
    "_native": frozenset(),
    "boot": frozenset(),
    "images": frozenset({"boot"}),
    "accel": frozenset({"_native"}),
    "report": frozenset({"control"}),
    "vmm": frozenset({"control"}),
    "command": frozenset({"session"}),
    "terminal": frozenset({"command", "session"}),
    "plan": frozenset({"accel", "boot", "config", "control", "images"}),
    "machine": frozenset(
        {"command", "config", "control", "plan", "report", "session", "terminal", "vmm"}
    ),
    "doctor": frozenset({"accel", "images", "vmm"}),
    "cli": frozenset({"__init__", "config", "doctor", "images", "machine", "report"}),
    "testing": frozenset({"_native"}),
    "__init__": frozenset(),  # what it offers is imported by name when it is used
    "__main__": frozenset({"cli"}),
    "_build_native": frozenset(),
}

#: Library -> the only modules that may import it (each has its reason in ARCHITECTURE.md).
LIBRARY_USERS: dict[str, frozenset[str]] = {
    "cffi": frozenset({"_build_native"}),
    "elftools": frozenset({"boot.elf", "images.modules"}),
    "lz4": frozenset({"boot.bzimage"}),
    "setuptools": frozenset({"_build_native"}),
    "zstandard": frozenset({"boot.bzimage", "images.deb", "images.modules"}),
}
LIBRARIES = frozenset({*LIBRARY_USERS, "iced_x86", "pyfuse3", "pytest", "trio"})

MODULES = sorted(
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")
    for path in PACKAGE.rglob("*.py")
)


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def run_time(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, but for the bodies of ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from run_time(other)
            continue
        yield child
        yield from run_time(child)


def imports(module: str) -> set[str]:
    """Dotted names that a module imports; those of ours as "microvm.ROOM..."."""
    found: set[str] = set()
    for node in run_time(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str:
    return module.split(".")[0]


def rooms_imported(module: str) -> set[str]:
    rooms: set[str] = set()
    for name in imports(module):
        first, _, rest = name.partition(".")
        if first == "microvm":
            room = room_of(rest) if rest else "__init__"
            is_room = (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").exists()
            rooms.add(room if is_room else "__init__")
    return rooms - {room_of(module)}


@pytest.mark.parametrize("module", MODULES)
def test_python_module_imports_only_what_its_room_may(module: str) -> None:
    assert room_of(module) in MAY_IMPORT, "a new room: say here and in ARCHITECTURE.md what it is"
    assert rooms_imported(module) - GROUND <= MAY_IMPORT[room_of(module)]


def test_python_ground_knows_only_itself() -> None:
    assert all(rooms_imported(module) <= GROUND for module in GROUND)


@pytest.mark.parametrize("module", MODULES)
def test_python_module_uses_only_libraries_with_a_reason(module: str) -> None:
    used = {name.split(".")[0] for name in imports(module)} & LIBRARIES
    assert all(module in LIBRARY_USERS.get(library, ()) for library in used), used


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) != "cli"])
def test_library_never_prints_or_exits(module: str) -> None:
    if module in ("_build_native", "__main__"):
        return
    text = {
        ast.unparse(node.func) for node in run_time(tree_of(module)) if isinstance(node, ast.Call)
    }
    assert not text & {"print", "sys.exit", "os._exit", "exit", "sys.stderr.write"}


# ---- C ---------------------------------------------------------------------------------------

#: Room of C -> public headers (native/include/mv) that it may see, itself or through others.
MACHINE = frozenset({"bus", "irq", "mem"})  # where vCPUs and devices meet
DEVICE = MACHINE | {"devices", "fdio", "layout", "loop", "virtio"}
VCPU = MACHINE | {"cpuid", "features", "layout", "vcpu", "vm"}
MAY_SEE: dict[str, frozenset[str]] = {
    "native/core": MACHINE | {"fdio", "loop"},
    "native/devices": DEVICE,
    "native/virtio": DEVICE,
    "native/vcpu/dbt": VCPU,
    "native/vcpu/kvm": VCPU | {"probe"},
    "native/vcpu": VCPU | {"silicon", "testapi"},
    "native/vmm": DEVICE | VCPU | {"control"},
    "rootfs": frozenset({"layout"}),
}
#: A room's private headers, and the files of other rooms that may include them.
PRIVATE_TO = {
    "native/vcpu/dbt": {"native/vcpu/handover.c", "native/vcpu/encodings.c"},
    "native/vcpu/kvm": {"native/vcpu/handover.c", "native/vcpu/run.c"},
    "native/vcpu": set[str](),
    "native/virtio": set[str](),
    "native/vmm": set[str](),
    "rootfs": set[str](),
}

SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("native", "rootfs")
    for path in (ROOT / folder).rglob("*.[chS]")
    if "include" not in path.parts
)


def includes(path: Path) -> set[Path]:
    """Files of ours that a file includes, all the way down."""
    found: set[Path] = set()
    todo = [path]
    while todo:
        at = todo.pop()
        for name in re.findall(r'^#\s*include "([^"]+)"', (ROOT / at).read_text(), re.MULTILINE):
            places = (at.parent / name, Path("native/include") / name)
            target = next(place for place in places if (ROOT / place).exists())
            if target not in found:
                found.add(target)
                todo.append(target)
    return found


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_c_file_sees_only_what_its_room_may(source: Path) -> None:
    room = str(source.parent)
    assert room in MAY_SEE, "a new room: say here and in ARCHITECTURE.md what it is"
    for header in includes(source):
        if header.parts[:2] == ("native", "include"):
            assert header.stem in MAY_SEE[room], f"{source} sees {header}"


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_c_file_leaves_other_rooms_private_headers_alone(source: Path) -> None:
    direct = re.findall(r'^#\s*include "([^"]+)"', (ROOT / source).read_text(), re.MULTILINE)
    for name in direct:
        header = source.parent / name
        if (ROOT / header).exists() and header.parent != source.parent:
            assert str(source) in PRIVATE_TO[str(header.parent)], f"{source} includes {name}"
