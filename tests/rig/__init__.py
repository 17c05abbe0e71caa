"""The devices without a machine: Python plays the guest's driver.

A `Rig` has guest RAM, buses, the I/O loop and interrupt lines (rig.c). A `Driver` speaks to one
virtio-mmio device in it as a guest would, rightly or wrongly: it builds rings in guest memory and
touches the registers. Numbers are those of virtio 1.2.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RIG_C = Path(__file__).with_name("rig.c")

MMIO = 0xD0000000
GSI = 5

# Registers, §4.2.2.
MAGIC, VERSION, DEVICE_ID, VENDOR = 0x00, 0x04, 0x08, 0x0C
DEVICE_FEATURES, DEVICE_FEATURES_SEL = 0x10, 0x14
DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x20, 0x24
QUEUE_SEL, QUEUE_SIZE_MAX, QUEUE_SIZE, QUEUE_READY = 0x30, 0x34, 0x38, 0x44
QUEUE_NOTIFY, INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x50, 0x60, 0x64, 0x70
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x80, 0x90, 0xA0
CONFIG_GENERATION, CONFIG = 0xFC, 0x100

# Device status, §2.1.
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
RUNNING = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK

# Features, §6; descriptor flags, §2.7.5.
F_INDIRECT, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32
NEXT, WRITE, INDIRECT = 1, 2, 4


@cache
def library() -> ctypes.CDLL:
    """rig.c and the device code, built for the tests (with sanitizers under `make asan`)."""
    asan = os.environ.get("MICROVM_NATIVE", "").endswith("-asan")
    native = ROOT / "native"
    rooms = [native / "core", native / "virtio", native / "devices"]
    sources = [RIG_C, *(c for room in rooms for c in sorted(room.glob("*.c")))]
    headers = [h for room in (*rooms, native / "include/mv") for h in room.glob("*.h")]
    so = ROOT / "build" / "tests" / f"rig{'-asan' if asan else ''}.so"
    newest = max(path.stat().st_mtime for path in (*sources, *headers))
    if not so.exists() or so.stat().st_mtime < newest:
        so.parent.mkdir(parents=True, exist_ok=True)
        fresh = so.with_suffix(f".{os.getpid()}")
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        subprocess.run(
            [
                *os.environ.get("CC", "cc").split(),
                *("-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-pthread"),
                *("-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing"),
                *(sanitize if asan else ()),
                *(f"-I{native / 'include'}", "-o", str(fresh), *map(str, sources)),
            ],
            check=True,
            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        )
        fresh.rename(so)
    lib = ctypes.CDLL(str(so), use_errno=True)
    pointer, u64, u32, int_ = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int
    for name, result, *arguments in (
        ("rig_new", pointer),
        ("rig_free", None, pointer),
        ("rig_add_ram", int_, pointer, u64, u64),
        ("rig_map_file", int_, pointer, u64, int_, u64, u64),
        ("rig_ram", pointer, pointer, u64, u64),
        ("rig_read", u64, pointer, int_, u64, u32),
        ("rig_write", None, pointer, int_, u64, u64, u32),
        ("rig_level", int_, pointer, u32),
        ("rig_edges", u32, pointer, u32),
        ("rig_written", u32, pointer, pointer, u32),
        ("rig_step", int_, pointer),
        ("rig_start", int_, pointer),
        ("rig_stop", None, pointer),
        ("rig_sink", ctypes.c_size_t, pointer, pointer, ctypes.c_size_t),
        ("rig_rng", pointer, pointer, u32),
        ("rig_console", pointer, pointer, u32, int_, int_),
        ("rig_blk", pointer, pointer, u32, int_, int_, ctypes.c_char_p),
        ("rig_vsock", pointer, pointer, u32),
        ("rig_notify_fd", int_, pointer, pointer),
        (
            "rig_connect",
            *(ctypes.c_int64, pointer, pointer, u32, int_, int_),
            *(ctypes.c_char_p, ctypes.c_size_t, int_),
        ),
        ("rig_closed", int_, pointer, int_, ctypes.POINTER(int_)),
        ("rig_offer", None, pointer, int_, int_, int_),
        ("rig_listen", int_, pointer, pointer, u32),
        ("rig_serial", pointer, pointer, int_),
        ("rig_pc_ports", int_, pointer),
        ("rig_debug_exit", int_, pointer),
        ("rig_resets", int_, pointer),
        ("rig_event", u32, pointer),
        ("rig_bus_add", int_, pointer, u64, u64, ctypes.c_size_t),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.mv_virtio_free.argtypes = lib.mv_serial_free.argtypes = [pointer]
    lib.mv_vsock_virtio.argtypes, lib.mv_vsock_virtio.restype = [pointer], pointer
    lib.mv_vsock_close.argtypes, lib.mv_vsock_close.restype = [pointer, ctypes.c_int64], None
    lib.mv_console_resize.argtypes = [pointer, ctypes.c_uint16, ctypes.c_uint16]
    lib.mv_console_resize.restype = None
    lib.mv_serial_input.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t]
    lib.mv_serial_input.restype = ctypes.c_size_t
    return lib


class Rig:
    """A machine without a vCPU: `ram` bytes at 0, by default 16 MiB. A context manager."""

    def __init__(self, ram: int = 16 << 20) -> None:
        self.lib = library()
        self.ptr = self.lib.rig_new()
        self.ram_end = 0
        self._devices: list[int] = []
        self._serials: list[int] = []
        self._threaded = False
        if ram:
            self.add_ram(0, ram)
            self.ram_end = ram

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._threaded:
            self.lib.rig_stop(self.ptr)
        for device in self._devices:
            self.lib.mv_virtio_free(device)
        for serial in self._serials:
            self.lib.mv_serial_free(serial)
        self.lib.rig_free(self.ptr)

    # -- memory and buses ---------------------------------------------------

    def add_ram(self, gpa: int, size: int) -> int:
        """0 or -errno."""
        result: int = self.lib.rig_add_ram(self.ptr, gpa, size)
        return result

    def load(self, gpa: int, size: int) -> bytes:
        """Guest memory, as the driver reads it."""
        where = self.lib.rig_ram(self.ptr, gpa, size)
        assert where or not size, f"{gpa:#x}+{size:#x} is not RAM"
        return ctypes.string_at(where, size) if size else b""

    def store(self, gpa: int, data: bytes) -> None:
        """Guest memory, as the driver writes it."""
        where = self.lib.rig_ram(self.ptr, gpa, len(data))
        assert where, f"{gpa:#x}+{len(data):#x} is not RAM"
        ctypes.memmove(where, data, len(data))

    def read(self, addr: int, size: int = 4) -> int:
        """MMIO read."""
        value: int = self.lib.rig_read(self.ptr, 0, addr, size)
        return value

    def write(self, addr: int, value: int, size: int = 4) -> None:
        """MMIO write."""
        self.lib.rig_write(self.ptr, 0, addr, value, size)

    def inp(self, port: int, size: int = 1) -> int:
        """Port read."""
        value: int = self.lib.rig_read(self.ptr, 1, port, size)
        return value

    def out(self, port: int, value: int, size: int = 1) -> None:
        """Port write."""
        self.lib.rig_write(self.ptr, 1, port, value, size)

    def written(self) -> list[tuple[int, int]]:
        """(gpa, length) of all writes reported to mv_mem.written since the last call."""
        out = (ctypes.c_uint64 * (2 * 65536))()
        n = self.lib.rig_written(self.ptr, out, 65536)
        return [(out[2 * i], out[2 * i + 1]) for i in range(n)]

    def sink(self) -> bytes:
        """What a serial port or console has said since the last call."""
        out = ctypes.create_string_buffer(1 << 20)
        size = self.lib.rig_sink(self.ptr, out, len(out))
        return out.raw[:size]

    # -- interrupts and the loop ---------------------------------------------

    def level(self, gsi: int) -> int:
        """Level of an interrupt line."""
        value: int = self.lib.rig_level(self.ptr, gsi)
        return value

    def edges(self, gsi: int) -> int:
        """How often a line went from 0 to 1."""
        value: int = self.lib.rig_edges(self.ptr, gsi)
        return value

    def step(self, times: int = 1) -> None:
        """Lets the loop serve what is ready."""
        for _ in range(times):
            assert self.lib.rig_step(self.ptr) == 0

    def until(self, condition: Callable[[], object], seconds: float = 10) -> None:
        """Steps the loop until the condition holds; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            if self._threaded:
                time.sleep(0.0005)
            else:
                self.step()

    def start_loop(self) -> None:
        """Runs the loop on a thread of its own until the rig ends, as the VMM does."""
        assert self.lib.rig_start(self.ptr) == 0
        self._threaded = True

    # -- devices ---------------------------------------------------------------

    def _device(self, device: int | None) -> int:
        if not device:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._devices.append(device)
        return device

    def rng(self, slot: int = 0) -> Driver:
        """An entropy device."""
        return Driver(self, self._device(self.lib.rig_rng(self.ptr, slot)), slot)

    def console(self, in_fd: int = -1, out_fd: int = -2, slot: int = 0) -> Driver:
        """A console; the descriptors are given away. out_fd -2: to sink()."""
        device = self._device(self.lib.rig_console(self.ptr, slot, in_fd, out_fd))
        return Driver(self, device, slot)

    def blk(self, fd: int, *, read_only: bool = False, ident: str = "", slot: int = 0) -> Driver:
        """A block device on a descriptor, which is given away."""
        device = self.lib.rig_blk(self.ptr, slot, fd, read_only, ident.encode())
        return Driver(self, self._device(device), slot)

    def vsock(self, slot: int = 0) -> tuple[int, Driver]:
        """A socket device: the handle for the host's side, and its driver."""
        handle = self.lib.rig_vsock(self.ptr, slot)
        assert handle
        return handle, Driver(self, self._device(self.lib.mv_vsock_virtio(handle)), slot)

    def serial(self, in_fd: int = -1) -> int:
        """A serial port."""
        serial: int = self.lib.rig_serial(self.ptr, in_fd)
        assert serial
        self._serials.append(serial)
        return serial


@dataclass(frozen=True, slots=True)
class Buf:
    """One buffer of a request."""

    gpa: int
    size: int
    write: bool = False


@dataclass(slots=True)
class Ring:
    """A split virtqueue as its driver holds it."""

    rig: Rig
    size: int
    desc: int
    avail: int
    used: int
    free: list[int] = field(default_factory=list)
    avail_idx: int = 0
    used_seen: int = 0
    chains: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.size))

    def put_desc(self, i: int, addr: int, size: int, flags: int = 0, next_: int = 0) -> None:
        """Writes one descriptor, whatever is in it."""
        self.rig.store(self.desc + 16 * i, struct.pack("<QIHH", addr, size, flags, next_))

    def put_avail(self, *heads: int) -> None:
        """Makes chains available by their heads."""
        for head in heads:
            at = self.avail + 4 + 2 * (self.avail_idx % self.size)
            self.rig.store(at, struct.pack("<H", head))
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.rig.store(self.avail + 2, struct.pack("<H", self.avail_idx))

    def add(self, bufs: Sequence[Buf]) -> int:
        """Chains buffers, makes them available; returns the head."""
        ids = [self.free.pop(0) for _ in bufs]
        for i, buf in enumerate(bufs):
            last = i == len(bufs) - 1
            flags = (WRITE if buf.write else 0) | (0 if last else NEXT)
            self.put_desc(ids[i], buf.gpa, buf.size, flags, 0 if last else ids[i + 1])
        self.chains[ids[0]] = ids
        self.put_avail(ids[0])
        return ids[0]

    @property
    def used_idx(self) -> int:
        """The device's index."""
        return int(struct.unpack("<H", self.rig.load(self.used + 2, 2))[0])

    def take(self) -> list[tuple[int, int]]:
        """(head, bytes written) of each chain completed since the last call."""
        done = []
        while self.used_seen != self.used_idx:
            at = self.used + 4 + 8 * (self.used_seen % self.size)
            head, size = struct.unpack("<II", self.rig.load(at, 8))
            self.free.extend(self.chains.pop(head, []))
            self.used_seen = (self.used_seen + 1) & 0xFFFF
            done.append((head, size))
        return done

    def set_used_event(self, value: int) -> None:
        """Where the driver wants the next interrupt (§2.7.7)."""
        at = self.avail + 4 + 2 * self.size
        self.rig.store(at, struct.pack("<H", value & 0xFFFF))

    @property
    def avail_event(self) -> int:
        """Where the device wants the next notification."""
        return int(struct.unpack("<H", self.rig.load(self.used + 4 + 8 * self.size, 2))[0])


class Driver:
    """A guest's driver of one device, for tests."""

    def __init__(self, rig: Rig, device: int, slot: int) -> None:
        self.rig = rig
        self.device = device
        self.base = MMIO + 0x1000 * slot
        self.gsi = GSI + slot
        self.rings: list[Ring] = []
        self._heap = 0x100000

    def r(self, reg: int, size: int = 4) -> int:
        """Reads a register."""
        return self.rig.read(self.base + reg, size)

    def w(self, reg: int, value: int, size: int = 4) -> None:
        """Writes a register."""
        self.rig.write(self.base + reg, value, size)

    @property
    def offered(self) -> int:
        """All 64 feature bits that the device offers."""
        value = 0
        for sel in (0, 1):
            self.w(DEVICE_FEATURES_SEL, sel)
            value |= self.r(DEVICE_FEATURES) << (32 * sel)
        return value

    def negotiate(self, features: int | None = None) -> bool:
        """Reset to FEATURES_OK. False: the device refused these features."""
        self.w(STATUS, 0)
        self.w(STATUS, ACKNOWLEDGE)
        self.w(STATUS, ACKNOWLEDGE | DRIVER)
        accepted = self.offered if features is None else features
        for sel in (0, 1):
            self.w(DRIVER_FEATURES_SEL, sel)
            self.w(DRIVER_FEATURES, accepted >> (32 * sel) & 0xFFFFFFFF)
        self.w(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return bool(self.r(STATUS) & FEATURES_OK)

    def set_queue(self, queue: int, size: int, desc: int, avail: int, used: int) -> bool:
        """Sets up a queue. False: QueueReady did not hold."""
        self.w(QUEUE_SEL, queue)
        self.w(QUEUE_SIZE, size)
        for reg, gpa in ((QUEUE_DESC, desc), (QUEUE_DRIVER, avail), (QUEUE_DEVICE, used)):
            self.w(reg, gpa & 0xFFFFFFFF)
            self.w(reg + 4, gpa >> 32)
        self.w(QUEUE_READY, 1)
        return bool(self.r(QUEUE_READY))

    def start(self, queues: int = 1, size: int = 64, features: int | None = None) -> Driver:
        """From reset to DRIVER_OK, with fresh rings from 0x10000 on."""
        assert self.negotiate(features)
        self.rings = []
        for queue in range(queues):
            at = 0x10000 + 0x4000 * queue
            ring = Ring(self.rig, size, at, at + 0x2000, at + 0x3000)
            self.rig.store(at, bytes(0x4000))
            assert self.set_queue(queue, size, ring.desc, ring.avail, ring.used)
            self.rings.append(ring)
        self.w(STATUS, RUNNING)
        assert self.r(STATUS) == RUNNING
        return self

    def notify(self, queue: int = 0) -> None:
        """Rings the bell."""
        self.w(QUEUE_NOTIFY, queue)

    @property
    def status(self) -> int:
        """Device status."""
        return self.r(STATUS)

    def ack(self) -> int:
        """Serves an interrupt: returns InterruptStatus and acknowledges it."""
        status = self.r(INTERRUPT_STATUS)
        self.w(INTERRUPT_ACK, status)
        return status

    def alloc(self, size: int, data: bytes = b"") -> int:
        """Guest memory for a buffer, 16-byte aligned; never freed."""
        gpa = self._heap
        self._heap += size + 15 & ~15
        assert self._heap <= self.rig.ram_end, "rig: out of guest RAM"
        self.rig.store(gpa, data.ljust(size, b"\0")) if size else None
        return gpa

    def request(self, *parts: bytes | int, queue: int = 0) -> tuple[bytes, int]:
        """One request: bytes are readable buffers, a number is a writable one of that size.

        Returns the writable bytes and used.len; the request must complete at once or, stepping
        the loop, within 10 s.
        """
        ring = self.rings[queue]
        bufs = [
            Buf(self.alloc(part), part, True)
            if isinstance(part, int)
            else Buf(self.alloc(len(part), part), len(part))
            for part in parts
        ]
        head = ring.add(bufs)
        self.notify(queue)
        done: list[tuple[int, int]] = []
        self.rig.until(lambda: done.extend(ring.take()) or done)
        assert [h for h, _ in done] == [head]
        return b"".join(self.rig.load(b.gpa, b.size) for b in bufs if b.write), done[0][1]
