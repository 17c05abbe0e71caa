"""mv-vmm by itself: a list of messages that cannot be executed ends it with a reason.

Rerun one: .venv/bin/python -m pytest tests/guest/test_vmm_messages.py -k X
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from microvm import control, layout
from microvm.boot import tables
from microvm.vmm import Vmm

MIB = 1 << 20
OPTIONS = control.options(control.DBT, 1)
RAM = control.ram(0, 64 * MIB)
ENTRY = control.entry(MIB, 0, 0x9000, layout.PML4_GPA, layout.GDT_GPA)


def raw(kind: int, body: bytes = b"", size: int | None = None) -> bytes:
    """A packet that says to be `size` bytes long."""
    whole = control.HEADER_FORMAT.size + len(body)
    return control.HEADER_FORMAT.pack(kind, whole if size is None else size) + body


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    with Vmm() as process:
        yield process


def ending(vmm: Vmm) -> control.Event:
    """The last event, after which the process ends."""
    while event := vmm.receive(20):
        if event.kind == control.EXIT:
            assert vmm.wait(20)
            assert vmm.wait_status == 0
            return event
    pytest.fail("end of file without EXIT")


BAD = {
    "unknown": ([raw(77)], 77, errno.EPROTO),
    "type zero": ([raw(0)], 0, errno.EPROTO),
    "event": ([raw(control.EXIT, bytes(24))], control.EXIT, errno.EPROTO),
    "wrong size": ([raw(control.RAM, bytes(16), size=99)], 0, errno.EPROTO),
    "short header": ([b"\1\2\3"], 0, errno.EPROTO),
    "short body": ([raw(control.RAM, bytes(15))], control.RAM, errno.EPROTO),
    "long body": ([raw(control.RAM, bytes(17))], control.RAM, errno.EPROTO),
    "version": ([raw(control.OPTIONS, b"\xff" * 32)], control.OPTIONS, errno.EPROTO),
    "options twice": ([OPTIONS, OPTIONS], control.OPTIONS, errno.EPROTO),
    "no cpus": ([control.options(control.DBT, 0)], control.OPTIONS, errno.EINVAL),
    "many cpus": ([control.options(control.DBT, 33)], control.OPTIONS, errno.EINVAL),
    "accel": ([control.options(9, 1)], control.OPTIONS, errno.EINVAL),
    "ram overlap": ([RAM, control.ram(MIB, MIB)], control.RAM, errno.EINVAL),
    "ram odd": ([control.ram(0, 4095)], control.RAM, errno.EINVAL),
    "ram wraps": ([control.ram(-4096 & (1 << 64) - 1, 8192)], control.RAM, errno.EINVAL),
    "data outside": ([RAM, *control.data(64 * MIB - 1, b"ab")], control.DATA, errno.EFAULT),
    "file without fd": ([RAM, control.file(0, 0, 4096, control.MAP)], control.FILE, errno.EPROTO),
    "device unknown": ([control.device(99)], control.DEVICE, errno.EINVAL),
    "serial twice": ([control.device(control.SERIAL)] * 2, control.DEVICE, errno.EEXIST),
    "vsock twice": ([control.device(control.VSOCK)] * 2, control.DEVICE, errno.EEXIST),
    "disk without fd": ([control.device(control.BLK)], control.DEVICE, errno.EPROTO),
    "17 devices": ([control.device(control.RNG)] * 17, control.DEVICE, errno.ENOSPC),
    "no options": ([RAM, ENTRY, control.start()], control.START, errno.EPROTO),
    "no entry": ([OPTIONS, RAM, control.start()], control.START, errno.EPROTO),
    "connect too early": ([control.connect(1024, 0, b"")], control.CONNECT, errno.EPROTO),
}


@pytest.mark.parametrize(("packets", "message", "error"), BAD.values(), ids=BAD)
def test_message_that_fails_ends_the_vmm_and_is_named(
    vmm: Vmm, packets: list[bytes], message: int, error: int
) -> None:
    for packet in packets:
        vmm.send(packet)
    event = ending(vmm)
    assert (event.code, event.message, event.value) == (control.SETUP, message, -error)
    assert event.content.endswith(os.strerror(error).encode())


@pytest.mark.parametrize(
    ("offset", "length", "how", "error"),
    [
        (0, 8192, control.MAP, errno.ENODATA),
        (4096, 4096, control.MAP, errno.ENODATA),
        (1 << 63, 4096, control.MAP, errno.ENODATA),
        (0, 5000, control.READ, errno.ENODATA),
        (0, 4096, 7, errno.EINVAL),
    ],
)
def test_file_that_is_too_short_is_refused(
    vmm: Vmm, tmp_path: Path, offset: int, length: int, how: int, error: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDONLY)
    vmm.send(RAM)
    vmm.send(control.file(0, offset, length, how), [fd])
    os.close(fd)
    event = ending(vmm)
    assert (event.message, event.value) == (control.FILE, -error)


def test_descriptors_of_a_refused_message_are_closed(vmm: Vmm) -> None:
    reader, writer = os.pipe()
    vmm.send(RAM, [writer])
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert ending(vmm).message == control.RAM


def test_stop_before_the_start_ends_it(vmm: Vmm) -> None:
    vmm.send(control.stop())
    assert ending(vmm).code == control.STOPPED


def test_query_before_the_start_is_answered(vmm: Vmm) -> None:
    vmm.send(control.query())
    kinds = []
    while not kinds or kinds[-1] != control.QUERY_END:
        event = vmm.receive(20)
        assert event
        kinds.append(event.kind)
    assert kinds == [control.STATS, control.QUERY_END]


def test_connection_without_vsock_closes_its_descriptors(vmm: Vmm) -> None:
    memory = (
        *control.data(layout.GDT_GPA, tables.gdt()),
        *control.data(layout.PML4_GPA, tables.page_tables(16 * MIB)),
        *control.data(MIB, b"\xeb\xfe"),  # jmp .
    )
    for packet in (OPTIONS, RAM, *memory, ENTRY, control.start()):
        vmm.send(packet)
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    vmm.connect(1024, b"", both=theirs.fileno(), done=writer)
    theirs.close()
    os.close(writer)
    assert ours.recv(1) == b""
    assert os.read(reader, 1) == b""
    os.close(reader)
    ours.close()
    vmm.send(control.stop())
    assert ending(vmm).code == control.STOPPED


def test_front_that_goes_away_ends_it() -> None:
    vmm = Vmm()
    vmm.send(OPTIONS)
    vmm.close()
    assert vmm.wait_status == 0


def test_vmm_has_no_descriptors_of_its_parent(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "secret", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(fd, True)
    with Vmm() as vmm:
        vmm.send(control.query())
        assert vmm.receive(20)
        held = [os.readlink(f"/proc/{vmm.pid}/fd/{n}") for n in os.listdir(f"/proc/{vmm.pid}/fd")]
    os.close(fd)
    assert not [name for name in held if "secret" in name]
