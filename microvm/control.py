"""The messages of the control socket: bytes in, bytes out.

``native/include/mv/control.h`` is the protocol's definition and says what each message means;
``tests/unit/test_control.py`` holds the numbers and formats below equal to it. This module opens
no socket.
"""

from __future__ import annotations

import os
from struct import Struct

from microvm._record import Record

VERSION = 1
FD = 3
PACKET_MAX = 65536
FDS_MAX = 4
PREFIX_MAX = 256
PATH_MAX = 4095
CONSOLE_MAX = 262144

# enum mv_ctl_type
OPTIONS, RAM, DATA, FILE, DEVICE, ENTRY, START = range(1, 8)
CONNECT, STOP, QUERY = range(16, 19)
STARTED, GUEST, CONSOLE, STATS, REGS, QUERY_END, EXIT = range(32, 39)

# enum mv_ctl_accel
KVM, DBT = 1, 2
# enum mv_ctl_flag
COUNT, NO_CHAIN, NO_TLB, NO_COALESCE, NO_FLAGS_LIVE = 1, 2, 4, 8, 16
# enum mv_ctl_file_how
MAP, READ = 1, 2
# enum mv_ctl_device_kind
SERIAL, HVC, RNG, BLK, VSOCK = range(1, 6)
# enum mv_ctl_device_flag
READ_ONLY = 1
# enum mv_ctl_connect_fd
FD_IN, FD_OUT, FD_BOTH, FD_DONE = 1, 2, 4, 8
# enum mv_ctl_reason
POWEROFF, REBOOT, PANIC, SHUTDOWN, DEBUG_EXIT, HALTED, STOPPED, BACKEND, SETUP = range(1, 10)

#: enum mv_exit, for reports.
EXIT_KINDS = (
    "none",
    "kicked",
    "hlt",
    "io",
    "mmio",
    "shutdown",
    "exception",
    "emulate",
    "error",
)
COUNTERS = (
    "instructions",
    "irqs",
    "translated_blocks",
    "translated_insns",
    "code_flushes",
    "tlb_misses",
    "revived_blocks",
)
REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rip", "rflags", "cr0", "cr2", "cr3", "cr4", "efer"),
)

# The structs, by the name they have in the header.
HEADER_FORMAT = Struct("<II")
OPTIONS_FORMAT = Struct("<IIIIIIQ")
RAM_FORMAT = Struct("<QQ")
DATA_FORMAT = Struct("<Q")
FILE_FORMAT = Struct("<QQQII")
DEVICE_FORMAT = Struct("<II")
ENTRY_FORMAT = Struct("<QQQQQ")
CONNECT_FORMAT = Struct("<II")
STARTED_FORMAT = Struct("<Q")
GUEST_FORMAT = Struct("<QII")
STATS_FORMAT = Struct(f"<{len(EXIT_KINDS)}Q{len(COUNTERS)}Q")
REGS_FORMAT = Struct(f"<{len(REGISTERS)}Q")
EXIT_FORMAT = Struct("<QIiII")

DATA_MAX = PACKET_MAX - HEADER_FORMAT.size - DATA_FORMAT.size

_NAMES = {
    OPTIONS: "options",
    RAM: "guest memory",
    DATA: "boot data",
    FILE: "file into guest memory",
    DEVICE: "device",
    ENTRY: "CPU entry",
    START: "start",
    CONNECT: "vsock connection",
}


def message_name(kind: int) -> str:
    """What a message does, in words, for error messages."""
    return _NAMES.get(kind, f"message {kind}")


def _packet(kind: int, body: bytes = b"") -> bytes:
    return HEADER_FORMAT.pack(kind, HEADER_FORMAT.size + len(body)) + body


def options(
    accel: int,
    ncpus: int,
    flags: int = 0,
    max_insns: int = 0,
    cache_bytes: int = 0,
    saved: str = "",
) -> bytes:
    """``accel`` is KVM or DBT, ``flags`` of enum mv_ctl_flag, ``cache_bytes`` bytes or 0.

    ``saved``: path of the file that keeps translations between starts (at most PATH_MAX bytes;
    a longer one is left out).
    """
    path = os.fsencode(saved)
    return _packet(
        OPTIONS,
        OPTIONS_FORMAT.pack(VERSION, accel, ncpus, flags, max_insns, 0, cache_bytes)
        + (path if len(path) <= PATH_MAX else b""),
    )


def ram(gpa: int, size: int) -> bytes:
    """RAM of ``size`` bytes at ``gpa``, page aligned."""
    return _packet(RAM, RAM_FORMAT.pack(gpa, size))


def data(gpa: int, content: bytes) -> list[bytes]:
    """``content`` at ``gpa``, in as many packets as it takes."""
    return [
        _packet(DATA, DATA_FORMAT.pack(gpa + at) + content[at : at + DATA_MAX])
        for at in range(0, len(content), DATA_MAX)
    ]


def file(gpa: int, offset: int, length: int, how: int) -> bytes:
    """``length`` bytes of the descriptor sent along, from ``offset``; ``how`` is MAP or READ."""
    return _packet(FILE, FILE_FORMAT.pack(gpa, offset, length, how, 0))


def device(kind: int, flags: int = 0) -> bytes:
    """A device; a descriptor sent along is its backing."""
    return _packet(DEVICE, DEVICE_FORMAT.pack(kind, flags))


def entry(rip: int, rsi: int, rsp: int, cr3: int, gdt: int) -> bytes:
    """Where vCPU 0 begins, in 64-bit mode."""
    return _packet(ENTRY, ENTRY_FORMAT.pack(rip, rsi, rsp, cr3, gdt))


def start() -> bytes:
    """Ends the list; the guest runs."""
    return _packet(START)


def connect(port: int, fds: int, prefix: bytes) -> bytes:
    """A vsock stream to ``port`` of the guest that begins with ``prefix``."""
    if len(prefix) > PREFIX_MAX:
        raise ValueError(f"prefix of {len(prefix)} bytes, at most {PREFIX_MAX} are possible")
    return _packet(CONNECT, CONNECT_FORMAT.pack(port, fds) + prefix)


def stop() -> bytes:
    """Pulls the plug."""
    return _packet(STOP)


def query() -> bytes:
    """Asks for counters and console."""
    return _packet(QUERY)


class Event(Record):
    """What the VMM says. ``time`` is CLOCK_MONOTONIC ns, 0 where the message has none.

    ``code``: guest event, or reason of an exit. ``value``: what the guest added, or the exit's
    value. ``message``: the message that failed, in an exit of reason SETUP. ``content``: console
    bytes, or an exit's text. ``numbers``: counters or registers by name.
    """

    kind: int
    time: int = 0
    code: int = 0
    value: int = 0
    message: int = 0
    content: bytes = b""
    numbers: dict[str, int] = {}  # noqa: RUF012 (never written to)


def decode(packet: bytes) -> Event:
    """One packet of the VMM. Raises ``ValueError`` if it is not of this protocol."""
    if len(packet) < HEADER_FORMAT.size:
        raise ValueError("short packet on the control socket")
    kind, size = HEADER_FORMAT.unpack_from(packet)
    body = packet[HEADER_FORMAT.size :]
    if size != len(packet):
        raise ValueError("packet on the control socket with a wrong size")
    fixed = _FIXED.get(kind)
    if fixed is None or len(body) < fixed.size:
        raise ValueError(f"unknown or short packet {kind} on the control socket")
    values = fixed.unpack_from(body)
    rest = body[fixed.size :]
    if kind == STARTED:
        return Event(kind=kind, time=values[0])
    if kind == GUEST:
        return Event(kind=kind, time=values[0], code=values[1], value=values[2])
    if kind == STATS:
        return Event(kind=kind, numbers=dict(zip((*EXIT_KINDS, *COUNTERS), values, strict=True)))
    if kind == REGS:
        return Event(kind=kind, numbers=dict(zip(REGISTERS, values, strict=True)))
    if kind == EXIT:
        time, code, value, message, _ = values
        return Event(kind=kind, time=time, code=code, value=value, message=message, content=rest)
    return Event(kind=kind, content=rest)


_NOTHING = Struct("<")
_FIXED = {
    STARTED: STARTED_FORMAT,
    GUEST: GUEST_FORMAT,
    CONSOLE: _NOTHING,
    STATS: STATS_FORMAT,
    REGS: REGS_FORMAT,
    QUERY_END: _NOTHING,
    EXIT: EXIT_FORMAT,
}
