"""Generated cases for user-level instructions, run on the host's silicon and on a vCPU.

A case is one instruction with random registers, memory, flags and vector state. The generator
knows nothing of what instructions do: it takes an encoding of the translator's table, fills in
random registers, lets the decoder say where the memory operand is, and chooses registers so that
it lies where it should: mostly in the data pages, sometimes across their end, in a read-only
page, or nowhere. See native/include/mv/silicon.h for the two worlds.

Some instructions are left out, because they may differ or would leave the sandbox: `EXCLUDED`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from microvm._native import ffi, lib
from microvm.errors import HostError
from microvm.testing.bare import NX, A, Bare, D, P, U, W

_MASK: Final = (1 << 64) - 1
_CODE: Final[int] = lib.MV_SI_CODE
_DATA: Final[int] = lib.MV_SI_DATA
_DATA_END: Final[int] = _DATA + lib.MV_SI_DATA_SIZE
_RO: Final[int] = lib.MV_SI_RO
_STACK: Final[int] = lib.MV_SI_STACK
_XSAVE: Final[int] = lib.MV_SI_XSAVE
_RSP, _RBP, _RSI, _RDI, _RBX, _RCX = 4, 5, 6, 7, 3, 1
_NONE, _RIP = lib.MV_REG_NONE, lib.MV_REG_RIP

#: RFLAGS bits that user code sees: arithmetic, DF, NT, AC, ID.
_FLAGS: Final = 0x8D5 | 1 << 10 | 1 << 14 | 1 << 18 | 1 << 21

#: By what they are recognised: they enter the host's kernel, read what differs between host and
#: guest (segments, time, CPUID, random numbers), or would change the child for good.
EXCLUDED_OPS: Final = frozenset(
    getattr(lib, f"MV_OP_{name}")
    for name in (
        "SYSCALL SYSENTER INT INT1 IRET JMP_FAR CALL_FAR RETF CPUID RDTSC RDTSCP RDPMC RDPID "
        "SGDT SIDT SLDT STR SMSW LAR LSL VERR VERW MOV_SEG_READ MOV_SEG_WRITE LXS POP_SEG "
        "RDFSBASE RDGSBASE WRFSBASE WRGSBASE XGETBV MONITOR MWAIT VMCALL VMMCALL"
    ).split()
)
EXCLUDED_NAMES: Final = frozenset(
    "rdrand rdseed xbegin xabort xend xtest umonitor umwait tpause wrpkru rdpkru rdsspd rdsspq "
    "enqcmd movdir64b".split()
)
#: Operands that are in one piece for every processor, in bytes.
_PLAIN_SIZES: Final = frozenset({1, 2, 4, 8, 16, 32})
#: Their flags are undefined; silicon leaves them as they were.
_LEAVES_FLAGS: Final = frozenset({"div", "idiv"})
_BREAKPOINT: Final = 3  #: how a case ends whose instruction did what it does
#: #SS, #GP, #PF
_MEMORY_FAULTS: Final = frozenset({12, 13, 14})
_GPR_NAMES: Final = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()


@dataclass(frozen=True, slots=True)
class Encoding:
    """One form of one row of the table."""

    row: int
    name: str
    enc: int  #: MV_ENC_*
    pp: int
    map: int
    opcode: int
    modrm: int
    w: int
    l: int  # noqa: E741 (the manual's name)
    vvvv: int
    aaa: int
    b: int
    has_mem: bool


@dataclass(frozen=True, slots=True)
class Case:
    """One instruction with its operands, as `struct mv_si_case`."""

    encoding: Encoding
    seed: str
    code: bytes
    raw: Any

    def __str__(self) -> str:
        return f"{self.encoding.name} [{self.code.hex(' ')}] (seed {self.seed})"


def decode(code: bytes) -> Any:
    """`struct mv_insn` of 64-bit code, or None if it is no instruction."""
    insn = ffi.new("struct mv_insn *")
    status = lib.mv_decode(insn, code, len(code), lib.MV_MODE_64)
    return insn if status == lib.MV_DECODE_OK else None


def row_name(row: int) -> str:
    """Mnemonic of a row of the table."""
    insn = ffi.new("struct mv_insn *")
    insn.row = row
    return str(ffi.string(lib.mv_insn_name(insn)).decode())


def all_encodings() -> Iterator[tuple[Encoding, Any]]:
    """Every encoding in 64-bit mode, with its plainest instance decoded."""
    limit = 20000
    out = ffi.new("struct mv_si_encoding[]", limit)
    for i in range(min(lib.mv_si_encodings(out, limit), limit)):
        e = out[i]
        fields = (e.pp, e.map, e.opcode, e.modrm, e.w, e.l, e.vvvv, e.aaa, e.b)
        encoding = Encoding(e.row, "", e.enc, *fields, has_mem=bool(e.has_mem))
        insn = decode(_bytes(encoding, random.Random(0), plain=True))
        if insn is None or insn.row != e.row:
            raise AssertionError(f"row {e.row}: the encoding does not decode to its row")
        yield replace(encoding, name=row_name(e.row)), insn


def encodings() -> list[Encoding]:
    """Every encoding that can be run on the silicon, features that guests lack left out."""
    return [
        encoding
        for encoding, insn in all_encodings()
        if insn.op not in EXCLUDED_OPS
        and encoding.name not in EXCLUDED_NAMES
        and all(lib.mv_si_feature_offered(f) for f in (insn.feature, insn.feature2))
    ]


# ---- one instruction's bytes ------------------------------------------------


def _bytes(e: Encoding, rng: random.Random, *, plain: bool = False) -> bytes:
    """The encoding with random registers and addressing; `plain`: as it was found."""
    modrm, tail = e.modrm, bytes(11)
    reg = r = x = 0
    b, vvvv = e.b, e.vvvv
    if not plain:
        reg, vvvv = rng.randrange(8), rng.randrange(16)
        r, x, b = (rng.randrange(2) for _ in range(3))
        modrm, tail = _random_modrm(modrm ^ reg << 3, rng), rng.randbytes(11)
    if e.enc == lib.MV_ENC_EVEX:
        p1 = e.w << 7 | (~vvvv & 15) << 3 | 4 | e.pp
        head = bytes((0x62, 0xF0 | e.map, p1, e.l << 5 | 8 | e.aaa, e.opcode))
        return (head + bytes((modrm,)) + tail)[:15]
    if e.enc == lib.MV_ENC_VEX:
        rxb = (~r & 1) << 7 | (~x & 1) << 6 | (~b & 1) << 5
        head = bytes((0xC4, rxb | e.map, e.w << 7 | (~vvvv & 15) << 3 | e.l << 2 | e.pp, e.opcode))
        return (head + bytes((modrm,)) + tail)[:15]
    head = b""
    if not plain and e.has_mem:
        segment_or_size = (b"\x65", b"\x67", b"\x65\x67", b"\x3e")
        head += rng.choice(segment_or_size) if rng.random() < 0.1 else b""
        head += b"\xf0" if rng.random() < 0.1 else b""
    head += (b"", b"\x66", b"\xf3", b"\xf2")[e.pp]
    rex = 0x40 | e.w << 3 | r << 2 | x << 1 | b
    if rex != 0x40 or (not plain and rng.random() < 0.3):
        head += bytes((rex,))
    head += (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[e.map] + bytes((e.opcode,))
    return (head + bytes((modrm,)) + tail)[:15]


def _random_modrm(modrm: int, rng: random.Random) -> int:
    if modrm >= 0xC0:
        return modrm ^ rng.randrange(8)
    if modrm & 7 == 4 and rng.random() < 0.5:
        return modrm | rng.randrange(3) << 6
    return (modrm & 0x38) | rng.randrange(3) << 6 | rng.randrange(8)


def _instruction(e: Encoding, rng: random.Random) -> tuple[bytes, Any]:
    """Random bytes of an encoding: most choices are legal, the rest is tried again."""
    for _ in range(30):
        code = _bytes(e, rng)
        insn = decode(code)
        if insn is None or insn.row != e.row or bool(insn.has_mem) != e.has_mem:
            continue
        if insn.cls == lib.MV_CLASS_XSAVE and {insn.base, insn.index} & {0, 2}:
            continue  # EDX:EAX says which components
        return code[: insn.len], insn
    # Rows of groups: reg and rm select the row.
    code = _bytes(e, rng, plain=True)
    insn = decode(code)
    return code[: insn.len], insn


# ---- operands ---------------------------------------------------------------


def _random_gpr(rng: random.Random) -> int:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randrange(80)
    if kind == 1:
        return -rng.randrange(1, 80) & _MASK
    if kind == 2:
        return (1 << rng.randrange(64)) - rng.randrange(2)
    if kind == 3:
        return rng.getrandbits(32)
    return rng.getrandbits(64)


def _target(insn: Any, rng: random.Random) -> int:
    """A virtual address for a memory operand."""
    size = insn.mem_size or 512
    align = insn.mem_align or min(size & -size, 64)
    kind = rng.random()
    if kind < 0.6:
        return rng.randrange(_DATA + 256, _DATA_END - max(size, 1024), 64) + rng.choice(
            (0, align) if align < 64 else (0,)
        )
    if kind < 0.75:
        return rng.randrange(_DATA + 256, _DATA_END - max(size, 1024))
    if kind < 0.8:
        return _DATA + 0x1000 - rng.randrange(size + 1)
    if kind < 0.86:
        return _RO + rng.randrange(0x800)
    if kind < 0.92:
        return _DATA_END - rng.randrange(size + 1)
    if kind < 0.96:
        return _DATA - rng.randrange(size + 1)
    return _DATA + 0x9000 if kind < 0.98 else 0x8000_0000_0000_0000 | rng.getrandbits(40)


@dataclass(slots=True)
class _Draft:
    """A case while it is made."""

    rng: random.Random
    insn: Any
    code: bytearray
    rip: int
    gpr: list[int]
    flags: int
    image: bytearray
    data: bytearray
    stack: bytearray

    def code_target(self) -> int:
        """Somewhere in the code pages, but not into the instruction itself."""
        here = range(self.rip - 1, self.rip + self.insn.len + 1)
        while (at := _CODE + self.rng.randrange(0x100, 0x1F00)) in here:
            pass
        return at

    def put(self, address: int, value: bytes) -> None:
        """Initial memory, if `address` is in the data pages or the stack."""
        for base, area in ((_DATA, self.data), (_STACK, self.stack)):
            if base <= address <= base + len(area) - len(value):
                area[address - base : address - base + len(value)] = value

    def point(self, target: int) -> None:
        """Chooses base register or displacement so that the memory operand is at `target`."""
        insn, gpr = self.insn, self.gpr
        mask = (1 << 8 * insn.addr_size) - 1
        if target > _DATA << 1 and insn.base in (_NONE, _RIP, _RSP, _RBP):
            target = _DATA + 0x9000
        want = target - insn.disp - (_DATA if insn.segment == lib.MV_SEG_GS else 0)
        if insn.base in (_NONE, _RIP):
            if insn.index != _NONE:
                gpr[insn.index] = 0
            want += insn.disp - (self.rip + insn.len if insn.base == _RIP else 0)
            bits = 8 * insn.disp_len
            if bits >= 32:
                disp = (want & (1 << bits) - 1).to_bytes(insn.disp_len, "little")
                self.code[insn.disp_off : insn.disp_off + insn.disp_len] = disp
        elif insn.index == insn.base:
            gpr[insn.base] = (want // (1 + insn.scale)) & _MASK
        else:
            if insn.base == _RSP and insn.index != _NONE:
                gpr[insn.index] = self.rng.randrange(8)  # pushes and pops stay in the sandbox
            if insn.index != _NONE:
                want -= gpr[insn.index] * insn.scale
            gpr[insn.base] = (gpr[insn.base] & ~mask) | want & mask

    def implicit_operands(self) -> None:
        """Registers that instructions use without naming them stay in the sandbox."""
        insn, gpr, rng = self.insn, self.gpr, self.rng
        if insn.cls == lib.MV_CLASS_STRING:
            for reg in (_RSI, _RDI):
                inside = rng.randrange(_DATA + 512, _DATA_END - 512)
                gpr[reg] = rng.choice((_target(insn, rng), inside, inside))
            gpr[_RCX] = rng.randrange(40) | (
                rng.getrandbits(32) << 32 if insn.addr_size == 4 else 0
            )
            self.flags |= rng.randrange(2) << 10
        elif insn.op == lib.MV_OP_XLAT:
            gpr[_RBX] = _target(insn, rng) - (gpr[0] & 0xFF) & _MASK
        elif insn.cls == lib.MV_CLASS_MASKED and not insn.has_mem:
            gpr[_RDI] = _target(insn, rng)
        elif insn.op in (lib.MV_OP_LEAVE, lib.MV_OP_ENTER):
            # Above all that ENTER pushes: it must not read what it has just written.
            gpr[_RBP] = _STACK + rng.randrange(0x920, 0xC00)
            if insn.op == lib.MV_OP_ENTER:
                at = insn.imm_off
                self.code[at : at + 2] = rng.randrange(0x200).to_bytes(2, "little")
        elif insn.cls == lib.MV_CLASS_BRANCH:
            self.branch_target()
        elif insn.op == lib.MV_OP_POPF:
            self.put(gpr[_RSP], (rng.getrandbits(12) & 0xCD5 | 2).to_bytes(8, "little"))
        elif insn.cls == lib.MV_CLASS_XSAVE:
            gpr[2], gpr[0] = 0, rng.randrange(8)
        if insn.op == lib.MV_OP_BT_MEM_REG and insn.reg.reg not in (insn.base, insn.index):
            bits = 8 * insn.op_size
            offset = rng.randrange(-2000, 2000) & (1 << bits) - 1
            gpr[insn.reg.reg] = gpr[insn.reg.reg] >> bits << bits | offset

    def branch_target(self) -> None:
        insn, gpr = self.insn, self.gpr
        if insn.op in (lib.MV_OP_RET, lib.MV_OP_RET_IMM):
            self.put(gpr[_RSP], self.code_target().to_bytes(8, "little"))
        elif insn.imm_len == 4:
            away = self.code_target() - self.rip - insn.len
            self.code[-4:] = (away & 0xFFFFFFFF).to_bytes(4, "little")
        elif insn.imm_len == 1 and -insn.len - 1 <= insn.imm <= 0:
            self.code[-1] = 0x40
        elif insn.rm.reg != _NONE:
            gpr[insn.rm.reg] = self.code_target()

    def memory_operand(self) -> None:
        insn, rng = self.insn, self.rng
        if insn.cls == lib.MV_CLASS_VSIB:
            self.gather_indices()
            return
        exceptions_unmasked = self.image[0] & 0x3F != 0x3F or not self.image[24] & 0x80
        if insn.op == lib.MV_OP_CLFLUSH or exceptions_unmasked or insn.mem_size not in _PLAIN_SIZES:
            # Whether a cache line is there is not looked at; which of two faults comes first, and
            # what of a long operand was written before one, differs by processor.
            target = _DATA + 64 * rng.randrange(8, 64)
        else:
            target = _target(insn, rng)
        if insn.cls == lib.MV_CLASS_BRANCH and target >> 12 == _RO >> 12:
            target = _DATA_END  # no code address there
        self.point(target)
        if insn.cls == lib.MV_CLASS_BRANCH:
            self.put(target, self.code_target().to_bytes(8, "little"))
        elif insn.cls == lib.MV_CLASS_XSAVE:
            self.put(target, bytes(_xsave(rng, 7)))

    def gather_indices(self) -> None:
        """Small indices, so that a gather's elements lie in the data pages."""
        insn = self.insn
        element = 4 if insn.opcode in (0x90, 0x92) else 8
        for area in (160, 576):  # xmm, upper half of ymm
            for at in range(area + 16 * insn.index, area + 16 * insn.index + 16, element):
                index = self.rng.randrange(0x60)
                self.image[at : at + element] = index.to_bytes(element, "little")
        if insn.base == _NONE:
            self.point(_DATA + 0x400)
        else:
            self.gpr[insn.base] = _DATA + 0x400 - insn.disp & _MASK

    def finish(self) -> Any:
        """`struct mv_si_case *`."""
        raw = ffi.new("struct mv_si_case *")
        state = getattr(raw, "in")
        state.gpr = self.gpr
        state.rip, state.rflags = self.rip, self.flags
        ffi.memmove(state.xsave, self.image, _XSAVE)
        ffi.memmove(state.data, self.data, len(self.data))
        ffi.memmove(state.stack, self.stack, len(self.stack))
        ffi.memmove(raw.code, self.code, len(self.code))
        raw.code_len = len(self.code)
        return raw


def _lanes(rng: random.Random, size: int) -> bytes:
    """Vector contents: random bytes, with the interesting floating point values among them."""
    floats = (0, 0x3F800000, 0xBF800000, 0x7F800000, 0x7FC00000, 0x7F800001, 1, 0x80000000)
    doubles = (0, 0x3FF0 << 48, 0xBFF0 << 48, 0x7FF0 << 48, 0x7FF8 << 48, 1, 1 << 63)
    out = bytearray(rng.randbytes(size))
    for at in range(0, size, 8):
        kind = rng.random()
        if kind < 0.15:
            out[at : at + 8] = rng.choice(doubles).to_bytes(8, "little")
        elif kind < 0.3:
            out[at : at + 4] = rng.choice(floats).to_bytes(4, "little")
        elif kind < 0.4:
            out[at : at + 8] = rng.randrange(1000).to_bytes(8, "little")
    return bytes(out)


def _xsave(rng: random.Random, xcr0: int) -> bytearray:
    """A legal XSAVE image. SDM 1 §13.4.1, §10.5.1."""
    image = bytearray(_XSAVE)
    control = 0x37F if rng.random() < 0.9 else 0x040 | rng.getrandbits(12) & 0xF3F
    image[0:2] = control.to_bytes(2, "little")
    image[2:4] = (rng.randrange(8) << 11 | rng.choice((0, 0x4700))).to_bytes(2, "little")
    image[4] = rng.getrandbits(8)  # abridged tags
    unmasked = rng.random() < 0.05
    mxcsr = 0x1F80 if not unmasked else 0x0000
    image[24:28] = (mxcsr | rng.randrange(4) << 13 | rng.choice((0, 0, 0x8040))).to_bytes(
        4, "little"
    )
    for reg in range(8):
        exponent = rng.choice((0, 0x3FFF, 0xBFFF, 0x7FFF, rng.getrandbits(16)))
        mantissa = rng.getrandbits(63) | (1 << 63 if exponent & 0x7FFF else 0)
        image[32 + 16 * reg : 42 + 16 * reg] = mantissa.to_bytes(8, "little") + exponent.to_bytes(
            2, "little"
        )
    image[160:416] = _lanes(rng, 256)
    image[512:520] = xcr0.to_bytes(8, "little")
    if xcr0 & 4:
        image[576:832] = _lanes(rng, 256)
    if xcr0 & 0xE0 == 0xE0:
        image[1088:1152] = rng.randbytes(64)
        image[1152:2688] = _lanes(rng, 1536)
    return image


def make_case(e: Encoding, seed: str, xcr0: int) -> Case:
    """The case of an encoding and a seed, always the same one."""
    rng = random.Random(seed)
    code, insn = _instruction(e, rng)
    draft = _Draft(
        rng=rng,
        insn=insn,
        code=bytearray(code),
        rip=_CODE + rng.randrange(0x200, 0x1E00),
        gpr=[_random_gpr(rng) for _ in range(16)],
        flags=0x202 | rng.getrandbits(12) & 0x8D5,
        image=_xsave(rng, xcr0),
        data=bytearray(rng.randbytes(lib.MV_SI_DATA_SIZE)),
        stack=bytearray(rng.randbytes(lib.MV_SI_STACK_SIZE)),
    )
    draft.gpr[_RSP] = _STACK + 0x800 + rng.choice((0, 0, 0, 8, 4, 1))
    draft.implicit_operands()
    if insn.has_mem:
        draft.memory_operand()
    return Case(e, seed, bytes(draft.code), draft.finish())


# ---- running ----------------------------------------------------------------


class SiliconGuest(Bare):
    """The guest's side: the sandbox mapped as in the child process, ring 3."""

    def __init__(self, backend: str, *, xcr0: int, options: dict[str, int] | None = None) -> None:
        super().__init__(backend, options=options)
        for base, size, rights in (
            (_CODE, lib.MV_SI_CODE_SIZE, 0),
            (_DATA, lib.MV_SI_DATA_SIZE, W | NX),
            (_RO, lib.MV_SI_RO_SIZE, NX),
            (_STACK, lib.MV_SI_STACK_SIZE, W | NX),
        ):
            self.map(base, base - lib.MV_SI_BASE + lib.MV_SI_GPA, size, P | U | A | D | rights)
        self.sregs.cr4 |= 1 << 18  # OSXSAVE
        self.sregs.gs.base = _DATA
        self.sregs.fs.selector = self.sregs.gs.selector = 0
        self.state.xcr0 = xcr0
        self.set_ring(3)

    def run_cases(self, cases: Sequence[Case]) -> Any:
        """Results, one a case. Raises HostError if the backend fails."""
        raw, results = _pack(cases)
        self.regs.rflags = 2
        if err := lib.mv_test_set_state(self._test, self.state):
            raise self._error("set state", err)
        if err := lib.mv_si_guest(self._test, raw, len(cases), results):
            raise self._error("run cases", err)
        return results


def run_natively(cases: Sequence[Case]) -> Any:
    """Results of the host's silicon, one a case. Raises HostError."""
    raw, results = _pack(cases)
    if err := lib.mv_si_native(raw, len(cases), results):
        raise HostError(f"cannot run cases natively: error {-err}")
    return results


def _pack(cases: Sequence[Case]) -> tuple[Any, Any]:
    raw = ffi.new("struct mv_si_case[]", len(cases))
    for i, case in enumerate(cases):
        raw[i] = case.raw[0]
    return raw, ffi.new("struct mv_si_result[]", len(cases))


def differences(case: Case, native: Any, guest: Any, *, exact_flags: bool = True) -> list[str]:
    """What the guest did otherwise; empty if nothing.

    exact_flags: compare arithmetic flags also where they are undefined, and where an instruction
    faults. The translator does not keep flags that code further on overwrites unseen.
    """
    if not native.ran:
        return ["the silicon never came back: the case leaves the sandbox"]
    if not guest.ran:
        return ["the vCPU never came back"]
    found = [
        f"{field}: {getattr(guest, field):#x}, silicon {getattr(native, field):#x}"
        for field in ("vector", "error")
        if getattr(guest, field) != getattr(native, field)
    ]
    # Which byte of a masked operand is told is the processor's affair.
    shift = 12 if "mask" in case.encoding.name else 0
    if guest.cr2 >> shift != native.cr2 >> shift:
        found.append(f"cr2: {guest.cr2:#x}, silicon {native.cr2:#x}")
    pairs = [(name, guest.out.gpr[i], native.out.gpr[i]) for i, name in enumerate(_GPR_NAMES)]
    pairs.append(("rip", guest.out.rip, native.out.rip))
    defined = native.vector == _BREAKPOINT and case.encoding.name not in _LEAVES_FLAGS
    if exact_flags or defined:
        pairs.append(("rflags", guest.out.rflags & _FLAGS, native.out.rflags & _FLAGS))
    found += [
        f"{name}: {ours:#x}, silicon {theirs:#x}" for name, ours, theirs in pairs if ours != theirs
    ]
    for area in ("xsave", "data", "stack"):
        ours = bytes(ffi.buffer(getattr(guest.out, area)))
        theirs = bytes(ffi.buffer(getattr(native.out, area)))
        if area == "xsave" and native.vector in _MEMORY_FAULTS:
            ours, theirs = _without_status(ours), _without_status(theirs)
        if ours != theirs:
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            found.append(
                f"{area}+{at:#x}: {ours[at : at + 16].hex()}, silicon {theirs[at : at + 16].hex()}"
            )
    return found


def _without_status(xsave: bytes) -> bytes:
    """Without x87 state and MXCSR: some processors change them before a memory fault."""
    return xsave[160:]


def compare(
    guest: SiliconGuest, cases: Iterable[Case], *, exact_flags: bool = True, batch: int = 256
) -> list[tuple[Case, list[str]]]:
    """Runs cases in both worlds; those that differ, with what differs."""
    wrong = []
    todo = list(cases)
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch]
        native, ours = run_natively(part), guest.run_cases(part)
        for i, case in enumerate(part):
            found = differences(case, native[i], ours[i], exact_flags=exact_flags)
            if found:
                wrong.append((case, found))
    return wrong
