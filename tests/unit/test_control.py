"""The Python and the C side of the control socket mean the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cffi import FFI

from microvm import control

ROOT = Path(__file__).resolve().parent.parent.parent
HEADER = ROOT / "native/include/mv/control.h"


@pytest.fixture(scope="module")
def header() -> FFI:
    text = HEADER.read_text()
    text = re.sub(r"^#(ifndef|define MV_CONTROL_H|include|endif).*$", "", text, flags=re.MULTILINE)
    ffi = FFI()
    ffi.cdef(text)
    return ffi


def enum_values(ffi: FFI, name: str) -> dict[str, int]:
    kind = ffi.typeof(f"enum {name}")
    return {label: value for value, label in kind.elements.items()}


@pytest.mark.parametrize(
    ("enum", "prefix"),
    [
        ("mv_ctl_type", "MV_CTL_"),
        ("mv_ctl_accel", "MV_CTL_"),
        ("mv_ctl_flag", "MV_CTL_"),
        ("mv_ctl_file_how", "MV_CTL_"),
        ("mv_ctl_device_kind", "MV_CTL_"),
        ("mv_ctl_device_flag", "MV_CTL_"),
        ("mv_ctl_connect_fd", "MV_CTL_"),
        ("mv_ctl_reason", "MV_CTL_R_"),
    ],
)
def test_control_enum_equals_the_header(header: FFI, enum: str, prefix: str) -> None:
    values = enum_values(header, enum)
    assert values
    assert {name: getattr(control, name.removeprefix(prefix)) for name in values} == values


@pytest.mark.parametrize(
    "name", ["VERSION", "FD", "PACKET_MAX", "FDS_MAX", "PREFIX_MAX", "PATH_MAX"]
)
def test_control_define_equals_the_header(name: str) -> None:
    found = re.search(rf"#define MV_CTL_{name}\s+(\d+)", HEADER.read_text())
    assert found
    assert getattr(control, name) == int(found[1])


@pytest.mark.parametrize(
    "struct",
    [
        "header",
        "options",
        "ram",
        "data",
        "file",
        "device",
        "entry",
        "connect",
        "started",
        "guest",
        "stats",
        "regs",
        "exit",
    ],
)
def test_control_struct_has_the_layout_of_the_header(header: FFI, struct: str) -> None:
    kind = header.typeof(f"struct mv_ctl_{struct}")
    sizes = {1: "b", 4: "i", 8: "q"}
    layout = ""
    for _, field in kind.fields:
        count = field.type.length if field.type.kind == "array" else 1
        item = field.type.item if field.type.kind == "array" else field.type
        layout += sizes[header.sizeof(item)] * count
    ours = getattr(control, f"{struct.upper()}_FORMAT")
    expanded = re.sub(r"(\d+)(\w)", lambda m: m[2] * int(m[1]), ours.format.lstrip("<"))
    assert expanded.lower() == layout
    assert ours.size == header.sizeof(kind)


def test_control_counters_are_in_the_order_of_the_header(header: FFI) -> None:
    stats = [name for name, _ in header.typeof("struct mv_ctl_stats").fields]
    registers = [name for name, _ in header.typeof("struct mv_ctl_regs").fields]
    assert stats == ["exits", *control.COUNTERS]
    assert registers == list(control.REGISTERS)


def test_control_exit_kinds_equal_the_vcpu_seam() -> None:
    text = (ROOT / "native/include/mv/vcpu.h").read_text()
    body = re.search(r"enum mv_exit \{(.*?)\};", text, re.DOTALL)
    assert body
    names = re.findall(r"MV_EXIT_(\w+)", re.sub(r"/\*.*?\*/", "", body[1], flags=re.DOTALL))
    assert [name.lower() for name in names if name != "COUNT"] == list(control.EXIT_KINDS)


def test_data_longer_than_a_packet_is_split_at_the_right_addresses() -> None:
    content = bytes(range(256)) * 600
    packets = control.data(0x1000, content)
    assert all(len(packet) <= control.PACKET_MAX for packet in packets)
    at = 0x1000
    joined = b""
    for packet in packets:
        (gpa,) = control.DATA_FORMAT.unpack_from(packet, control.HEADER_FORMAT.size)
        assert gpa == at
        part = packet[control.HEADER_FORMAT.size + control.DATA_FORMAT.size :]
        joined += part
        at += len(part)
    assert joined == content


def test_decode_exit_gives_reason_value_and_text() -> None:
    body = control.EXIT_FORMAT.pack(123, control.SETUP, -12, control.RAM, 0) + b"no room"
    packet = control.HEADER_FORMAT.pack(control.EXIT, 8 + len(body)) + body
    event = control.decode(packet)
    assert (event.time, event.code, event.value, event.message, event.content) == (
        123,
        control.SETUP,
        -12,
        control.RAM,
        b"no room",
    )


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\0" * 7,
        control.HEADER_FORMAT.pack(control.EXIT, 8),
        control.HEADER_FORMAT.pack(control.CONSOLE, 9),
        control.HEADER_FORMAT.pack(999, 8),
    ],
)
def test_decode_malformed_packet_raises(packet: bytes) -> None:
    with pytest.raises(ValueError, match="packet"):
        control.decode(packet)


def test_connect_prefix_too_long_raises() -> None:
    with pytest.raises(ValueError, match="prefix"):
        control.connect(1024, 0, bytes(control.PREFIX_MAX + 1))
