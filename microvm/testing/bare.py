"""A bare 64-bit machine around one vCPU: page tables, GDT, IDT, TSS; no operating system.

Every exception and interrupt that the payload does not handle itself ends the run, with all
registers as they were:

    with Bare("kvm") as m:
        out = m.run_code("mov rax, [0x7000000000]")
        assert out.vector == 14 and m.sregs.cr2 == 0x7000000000

A payload ends a run itself with the macro `done`. It runs in ring 0 unless `user=True`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from microvm._native import lib
from microvm.testing.assemble import assemble
from microvm.testing.vcpu import EXIT_PORT, Stop, Vcpu

# Guest-physical layout; the first 16 MiB are mapped one to one, for ring 0 and ring 3.
GDT: Final = 0x1000
IDT: Final = 0x2000
TSS: Final = 0x3000
STUBS: Final = 0x4000  #: one catch-all a vector, 16 bytes each
CATCH: Final = 0x5000  #: where the stubs meet
PML4: Final = 0x8000
TABLES: Final = 0x9000  #: page tables are taken from here
TABLES_END: Final = 0x40000
CODE: Final = 0x100000
STACK_TOP: Final = 0x200000  #: of the payload
RING0_STACK_TOP: Final = 0x210000  #: on which ring 3's exceptions land
DATA: Final = 0x300000  #: the payload's, 1 MiB

# Selectors; the order is what SYSCALL and SYSRET want (STAR = 0x10 << 48 | 0x08 << 32).
KERNEL_CS: Final = 0x08
KERNEL_DS: Final = 0x10
USER_DS: Final = 0x1B
USER_CS: Final = 0x23
TSS_SEL: Final = 0x28

# Page table entries, SDM 3A §4.5.
P: Final = 1
W: Final = 2
U: Final = 4
A: Final = 1 << 5
D: Final = 1 << 6
PS: Final = 1 << 7
G: Final = 1 << 8
NX: Final = 1 << 63

EFER: Final = 0xC0000080
EFER_SCE: Final = 1
EFER_NXE: Final = 1 << 11

#: Vectors that push an error code, SDM 3A table 6-1.
WITH_ERROR_CODE: Final = frozenset({8, 10, 11, 12, 13, 14, 17})

_PAGE: Final = 0x1000
_PRELUDE: Final = f"""
.macro done
  out {EXIT_PORT}, al
  jmp .
.endm
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. With reason "exception", the rest is what the processor pushed."""

    reason: str  #: as in Stop, or "exception"
    vector: int = -1
    error: int = 0
    rip: int = 0
    cs: int = 0
    rflags: int = 0
    rsp: int = 0
    ss: int = 0


def _descriptor(kind: int, dpl: int, *, long: bool = False) -> int:
    """A flat code (0xB) or data (0x3) segment."""
    low = 0x0000FFFF
    high = 0x00CF9000 | kind << 8 | dpl << 13
    if long:
        high = (high & ~(1 << 22)) | 1 << 21
    return high << 32 | low


def _system_descriptor(kind: int, base: int, limit: int) -> tuple[int, int]:
    low = (limit & 0xFFFF) | (base & 0xFFFFFF) << 16 | kind << 40 | 1 << 47
    return low | (base >> 24 & 0xFF) << 56, base >> 32


class Bare(Vcpu):
    """A vCPU in the world described above. Arguments are those of Vcpu."""

    def __init__(self, backend: str, **options: object) -> None:
        super().__init__(backend, **options)  # type: ignore[arg-type]
        self._next_table = TABLES
        self._set_up_tables()
        self.map_large(0, 0, 16 << 20, P | W | U)
        self._set_up_registers()

    # ---- set-up -----------------------------------------------------------

    def _set_up_tables(self) -> None:
        tss_low, tss_high = _system_descriptor(0x9, TSS, 0x67)
        gdt = (
            0,
            _descriptor(0xB, 0, long=True),
            _descriptor(0x3, 0),
            _descriptor(0x3, 3),
            _descriptor(0xB, 3, long=True),
            tss_low,
            tss_high,
        )
        self.write(GDT, struct.pack("<7Q", *gdt))
        tss = bytearray(0x68)
        tss[4:12] = RING0_STACK_TOP.to_bytes(8, "little")
        tss[0x66:0x68] = (0x68).to_bytes(2, "little")  # no I/O bitmap
        self.write(TSS, bytes(tss))
        stubs = "".join(
            f".org {16 * vector}\n"
            + ("" if vector in WITH_ERROR_CODE else "push 0\n")
            + f"push {vector}\njmp {CATCH}\n"
            for vector in range(256)
        )
        self.write(STUBS, assemble(stubs, STUBS))
        self.write(CATCH, assemble(_PRELUDE + "done", CATCH))
        for vector in range(256):
            self.set_gate(vector, STUBS + 16 * vector, dpl=3)

    def _set_up_registers(self) -> None:
        lib.mv_test_long_mode(self.state, CODE, PML4, GDT)
        self.regs.rsp = STACK_TOP
        s = self.sregs
        s.cr4 |= 3 << 9  # OSFXSR, OSXMMEXCPT
        s.efer |= EFER_SCE | EFER_NXE
        s.gdt.limit = 7 * 8 - 1
        s.idt.base, s.idt.limit = IDT, 0xFFF
        s.tr.base, s.tr.limit, s.tr.selector, s.tr.type = TSS, 0x67, TSS_SEL, 11
        self.set_ring(0)

    def set_ring(self, ring: int) -> None:
        """Code and stack segments of ring 0 or 3 for the next run."""
        s = self.sregs
        s.cs.selector = USER_CS if ring else KERNEL_CS
        s.cs.dpl = s.ss.dpl = ring
        for segment in (s.ss, s.ds, s.es):
            segment.selector = USER_DS if ring else KERNEL_DS
            segment.dpl = ring

    def set_gate(self, vector: int, handler: int, *, dpl: int = 0, ist: int = 0) -> None:
        """An interrupt gate of the IDT. SDM 3A §6.14.1."""
        low = (handler & 0xFFFF) | KERNEL_CS << 16 | ist << 32 | 0xE << 40 | dpl << 45 | 1 << 47
        low |= (handler >> 16 & 0xFFFF) << 48
        self.write(IDT + 16 * vector, struct.pack("<QQ", low, handler >> 32))

    # ---- page tables ------------------------------------------------------

    def _entry(self, gva: int, level: int) -> int:
        """Address of the entry for `gva` at a level (4: PML4 ... 1: PT); makes tables."""
        table = PML4
        for at in range(4, level, -1):
            slot = table + 8 * (gva >> (12 + 9 * (at - 1)) & 511)
            entry = int.from_bytes(self.read(slot, 8), "little")
            if not entry & P:
                entry = self._next_table | P | W | U
                self._next_table += _PAGE
                assert self._next_table <= TABLES_END
                self.write(slot, entry.to_bytes(8, "little"))
            table = entry & 0xFFFFFFFFFF000
        return table + 8 * (gva >> (12 + 9 * (level - 1)) & 511)

    def map(self, gva: int, gpa: int, size: int, flags: int) -> None:
        """Maps 4 KiB pages; flags 0 removes the mapping. Flushes nothing."""
        for at in range(0, size, _PAGE):
            entry = gpa + at | flags if flags else 0
            self.write(self._entry(gva + at, 1), entry.to_bytes(8, "little"))

    def map_large(self, gva: int, gpa: int, size: int, flags: int) -> None:
        """Maps 2 MiB pages."""
        for at in range(0, size, 2 << 20):
            self.write(self._entry(gva + at, 2), (gpa + at | flags | PS).to_bytes(8, "little"))

    def pte_address(self, gva: int) -> int:
        """Guest-physical address of the 4 KiB page table entry for `gva`."""
        return self._entry(gva, 1)

    def large_entry_address(self, gva: int) -> int:
        """The same of the page directory entry, which maps 2 MiB."""
        return self._entry(gva, 2)

    def huge_entry_address(self, gva: int) -> int:
        """The same of the page directory pointer table entry, which maps 1 GiB."""
        return self._entry(gva, 3)

    # ---- run --------------------------------------------------------------

    def load(self, source: str, at: int = CODE) -> bytes:
        """Assembles `source` (Intel syntax, `done` ends the run) and writes it at `at`."""
        code = assemble(_PRELUDE + source, at)
        self.write(at, code)
        return code

    def run_code(
        self, source: str, *, user: bool = False, rflags: int = 2, timeout: float = 5.0
    ) -> Outcome:
        """Loads `source` at CODE and runs it from there, on the payload's stack.

        The other registers are as they were left.
        """
        self.load(source)
        self.set_ring(3 if user else 0)
        self.regs.rip, self.regs.rsp, self.regs.rflags = CODE, STACK_TOP, rflags
        return self.go(timeout)

    def go(self, timeout: float = 5.0) -> Outcome:
        """Runs from the state as it is."""
        stop: Stop = self.run(timeout)
        if stop.reason != "done" or not CATCH <= self.regs.rip < CATCH + 16:
            return Outcome(stop.reason, rip=self.regs.rip)
        vector, error, rip, cs, rflags, rsp, ss = struct.unpack("<7Q", self.read(self.regs.rsp, 56))
        return Outcome("exception", vector, error, rip, cs, rflags, rsp, ss)
