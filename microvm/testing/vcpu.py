"""A bare vCPU in process: memory, registers and code in; why it stopped and its state out.

    with Vcpu("dbt") as vcpu:
        vcpu.write(CODE, bytes.fromhex("b8 2a 00 00 00 e6 f4 eb fe"))  # mov eax,42; out 0xf4; jmp .
        vcpu.long_mode(rip=CODE)
        assert vcpu.run().reason == "done"
        assert vcpu.regs.rax == 42

RAM is `[0, ram)`. Every port, and MMIO at `MMIO_GPA`, is a device that logs accesses (`Vcpu.log`);
byte i of a read is the low byte of (address + i). A write to port `EXIT_PORT` ends the run; code
must wait behind it (`jmp .`). State is KVM's own structs on both backends.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from microvm._native import ffi, lib
from microvm.errors import HostError

MMIO_GPA: int = lib.MV_TEST_MMIO_GPA
EXIT_PORT: int = lib.MV_PORT_DEBUG_EXIT
#: Where `Vcpu.long_mode` puts its GDT and page tables (identity map of the first 4 GiB).
GDT = 0x500
PAGE_TABLES = 0x9000
PAGE_TABLES_END = PAGE_TABLES + 6 * 0x1000

_BOOT_GDT = (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
_ENDS = {
    lib.MV_TEST_DONE: "done",
    lib.MV_TEST_KICKED: "kicked",
    lib.MV_TEST_TIMEOUT: "timeout",
}
_EXITS = {
    lib.MV_EXIT_HLT: "hlt",
    lib.MV_EXIT_SHUTDOWN: "shutdown",
    lib.MV_EXIT_EMULATE: "emulate",
    lib.MV_EXIT_ERROR: "error",
}


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a run ended.

    `reason` is "done" (exit port written), "hlt" (only with `hlt_exits`), "shutdown" (triple
    fault), "timeout", "kicked", "emulate" (KVM gave up and hand-over is off) or "error".
    """

    reason: str
    error: int = 0  #: -errno of the backend, with reason "error"


@dataclass(frozen=True, slots=True)
class Access:
    """One access to the test device."""

    space: str  #: "port" or "mmio"
    kind: str  #: "read" or "write"
    addr: int
    len: int  #: bytes
    value: int


class Vcpu:
    """One vCPU of a backend, with RAM and the test device around it.

    backend: "kvm" or "dbt". ram: bytes, whole pages. hlt_exits: HLT ends the run (a vCPU of KVM
    then has no APIC). count: count guest instructions. handover: "auto", "step" or "never".
    options: switches of the translator (`no_chain`, `no_tlb`, `no_coalesce`, `no_flags_live`,
    `max_insns`, `cache_bytes`). Raises HostError when the backend cannot be had.
    """

    def __init__(
        self,
        backend: str,
        *,
        ram: int = 16 << 20,
        hlt_exits: bool = False,
        count: bool = False,
        handover: str = "never",
        options: dict[str, int] | None = None,
    ) -> None:
        name = ffi.new("char[]", backend.encode())
        config = ffi.new("struct mv_test_config *")
        config.backend = name
        config.ram_size = ram
        config.hlt_exits = hlt_exits
        config.count = count
        config.handover = ("auto", "step", "never").index(handover)
        for option, value in (options or {}).items():
            setattr(config.dbt, option, value)
        out, failed = ffi.new("struct mv_test **"), ffi.new("char **")
        err = lib.mv_test_new(out, config, ffi.cast("const char **", failed))
        if err:
            what = ffi.string(failed[0]).decode()
            raise HostError(f"cannot create a vCPU of {backend}: {what}: {os.strerror(-err)}")
        self._test: Any = out[0]
        self.backend = backend
        #: Guest RAM, writable. Writing here while translations of the bytes exist needs `write`.
        self.ram: Any = ffi.buffer(lib.mv_test_ram(self._test), ram)
        #: The state (struct mv_vcpu_state) that the next run starts from, that the last left.
        self.state: Any = ffi.new("struct mv_vcpu_state *")
        self._get_state()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the vCPU; `ram` must not be used any more."""
        if self._test is not None:
            self.ram = None
            lib.mv_test_free(self._test)
            self._test = None

    @property
    def regs(self) -> Any:
        """struct kvm_regs of `state`: rax ... r15, rip, rflags."""
        return self.state.regs

    @property
    def sregs(self) -> Any:
        """struct kvm_sregs of `state`: segments, cr0, cr2, cr3, cr4, efer."""
        return self.state.sregs

    def msr(self, index: int) -> int:
        """A model-specific register of `state`. KeyError if the backend does not keep it."""
        for i in range(self.state.nmsrs):
            if self.state.msrs[i].index == index:
                return int(self.state.msrs[i].data)
        raise KeyError(f"MSR {index:#x} is not in the state")

    def set_msr(self, index: int, value: int) -> None:
        """Sets an MSR of `state`, for the next run."""
        for i in range(self.state.nmsrs):
            if self.state.msrs[i].index == index:
                self.state.msrs[i].data = value
                return
        self.state.msrs[self.state.nmsrs] = {"index": index, "reserved": 0, "data": value}
        self.state.nmsrs += 1

    def write(self, gpa: int, data: bytes) -> None:
        """Writes guest RAM as a device would: translations of the bytes are dropped."""
        self.ram[gpa : gpa + len(data)] = data
        lib.mv_test_ram_written(self._test, gpa, len(data))

    def read(self, gpa: int, length: int) -> bytes:
        return bytes(self.ram[gpa : gpa + length])

    def long_mode(self, *, rip: int, rsp: int = 0) -> None:
        """64-bit mode, ring 0, flat segments, the first 4 GiB mapped one to one, interrupts off."""
        tables = bytearray(6 * 0x1000)

        def entry(at: int, value: int) -> None:
            tables[at : at + 8] = value.to_bytes(8, "little")

        present_write_user = 7
        entry(0, (PAGE_TABLES + 0x1000) | present_write_user)
        for gib in range(4):
            entry(0x1000 + 8 * gib, (PAGE_TABLES + 0x2000 + 0x1000 * gib) | present_write_user)
        for page in range(4 * 512):
            entry(0x2000 + 8 * page, page << 21 | 0x80 | present_write_user)
        self.write(PAGE_TABLES, bytes(tables))
        self.write(GDT, b"".join(entry.to_bytes(8, "little") for entry in _BOOT_GDT))
        lib.mv_test_long_mode(self.state, rip, PAGE_TABLES, GDT)
        self.state.regs.rsp = rsp

    def run(self, timeout: float = 5.0) -> Stop:
        """Runs from `state` until there is a reason to stop; `timeout` in seconds."""
        if err := lib.mv_test_set_state(self._test, self.state):
            raise self._error("set state", err)
        info = ffi.new("struct mv_exit_info *")
        end = lib.mv_test_run(self._test, int(timeout * 1000), info)
        self._get_state()
        return Stop(_ENDS.get(end) or _EXITS.get(info.reason, "error"), info.error)

    def reload(self) -> None:
        """Gives `state` to the vCPU and reads it back, without a run."""
        if err := lib.mv_test_set_state(self._test, self.state):
            raise self._error("set state", err)
        self._get_state()

    def kick(self) -> None:
        """Ends a run that another thread has begun."""
        lib.mv_test_kick(self._test)

    def hand_over(self) -> None:
        """From KVM to the translator, for good, with the state as the last run left it."""
        if err := lib.mv_test_hand_over(self._test):
            raise self._error("hand over", err)

    def irq(self, gsi: int, level: bool) -> None:
        """Sets the level of an interrupt line. Any thread."""
        lib.mv_test_irq(self._test, gsi, level)

    def log(self) -> list[Access]:
        """Accesses to the test device since the last call, oldest first."""
        out = ffi.new("struct mv_test_access[]", lib.MV_TEST_LOG_MAX)
        return [
            Access(
                ("port", "mmio")[out[i].space],
                ("read", "write")[out[i].is_write],
                out[i].addr,
                out[i].len,
                out[i].value,
            )
            for i in range(lib.mv_test_log(self._test, out))
        ]

    def stats(self) -> Any:
        """struct mv_vcpu_stats."""
        out = ffi.new("struct mv_vcpu_stats *")
        lib.mv_test_stats(self._test, out)
        return out

    def _get_state(self) -> None:
        if err := lib.mv_test_get_state(self._test, self.state):
            raise self._error("get state", err)

    def _error(self, what: str, err: int) -> HostError:
        failed = ffi.string(lib.mv_test_failed(self._test)).decode()
        return HostError(f"{self.backend}: cannot {what}: {failed}: {os.strerror(-err)}")
