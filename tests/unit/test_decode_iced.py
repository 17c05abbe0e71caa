"""The instruction decoder against iced-x86, over systematically generated encodings.

Every opcode of every map is tried with mandatory prefixes, REX or VEX fields and ModRM forms.
Validity and length are compared for all of them; operands, memory, registers and flags for one
of each kind (iced's code, form of the operand, prefixes).  A difference is a bug of ours, or it
stands in one of the tables below with its reason.

MICROVM_DECODE_EXHAUSTIVE=1 tries all 256 ModRM bytes with all prefixes (minutes).
Rerun: python -m pytest tests/unit/test_decode_iced.py
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from decoder_under_test import OK, Batch, CDecoder, Decoded
from iced_x86 import (
    Code,
    CodeSize,
    CpuidFeature,
    Decoder,
    DecoderOptions,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
    RflagsBits,
)

EXHAUSTIVE = bool(os.environ.get("MICROVM_DECODE_EXHAUSTIVE"))

CODE_NAMES = {v: k for k, v in vars(Code).items() if k.isupper()}
SHIFTS = {
    v
    for k, v in ((name, code) for code, name in CODE_NAMES.items())
    if re.match(r"(RO|RC|SH|SA)[LR]D?_.*IMM8$", k)
}
FEATURE_NAMES = {v: k for k, v in vars(CpuidFeature).items() if k.isupper()}

# ---- what iced knows and we do not offer -----------------------------------------------------

#: Extensions that no guest is offered: their encodings are undefined, or NOPs, as on a CPU
#: without them.
ABSENT = set(
    """
    AESKLE AMX_BF16 AMX_COMPLEX AMX_FP16 AMX_INT8 AMX_TILE AVX512ER AVX512PF AVX512_4FMAPS
    AVX512_4VNNIW AVX_IFMA AVX_NE_CONVERT AVX_VNNI_INT16 AVX_VNNI_INT8 CENTAUR_AIS CET_IBT CET_SS
    CL1INVMB CLZERO CMPCCXADD CYRIX_D3NOW CYRIX_DDI CYRIX_DMI CYRIX_EMMI CYRIX_FPU CYRIX_SHR
    CYRIX_SMINT CYRIX_SMINT_0F7E CYRIX_SMM D3NOW D3NOWEXT ENQCMD FMA4 FRED HLE HLE_OR_RTM HRESET
    INVEPT INVLPGB INVVPID KL KNC LKGS LWP MCOMMIT MONITORX MOVDIR64B MPX MSRLIST OSS PADLOCK_ACE
    PADLOCK_GMI PADLOCK_PHE PADLOCK_PMM PADLOCK_RNG PADLOCK_UNDOC PCOMMIT PCONFIG PKU PTWRITE
    RAO_INT RDPRU RMPQUERY RTM SEV_ES SEV_SNP SGX1 SHA512 SKINIT SKINIT_OR_SVM SM3 SM4 SMM SMX
    SSE4A SVM TBM TDX TSE TSXLDTRK UDBG UINTR UMOV VMX WAITPKG WBNOINVD WIDE_KL WRMSRNS XOP
    PREFETCHITI PREFETCHWT1
    """.split()
)
#: ... and those of them whose encodings we do know.
KNOWN = {
    "RSM": "undefined outside SMM: class UD",
    "WBNOINVD": "WBINVD with an ignored prefix",
    "ENDBR64": "NOP",
    "ENDBR32": "NOP",
    "RDSSPD_R32": "NOP",
    "RDSSPQ_R64": "NOP",
}
#: Not compared: hypercalls are KVM's to us, whatever the vendor.
HYPERCALLS = {"VMCALL", "VMMCALL"}


def is_offered(instruction: Instruction) -> bool:
    names = {FEATURE_NAMES[f] for f in instruction.cpuid_features()}
    return not names & ABSENT or CODE_NAMES[instruction.code] in KNOWN


# ---- encodings ----------------------------------------------------------------------------------

PAYLOAD = bytes.fromhex("11223344556677815aa5")  # displacement and immediate bytes
HEADS_MAIN = [b"", b"\x66", b"\xf3", b"\xf2"]
HEADS_MORE = [
    bytes.fromhex(h)
    for h in (
        "48 6648 f348 f248 41 44 42 40 4f 67 64 653e 642e 2e65 f0 66f0 66f2 66f3 f0f3 f2f3 f3f2"
        " 4826 4866 6766 f067 6641 f34f"
    ).split()
]
HEADS_LEGACY_MODE = [bytes.fromhex(h) for h in "66 67 6667 f3 f2 f0 66f2 26 64 f3f2".split()]
MAPS = [b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"]
PREFIX_BYTES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3") | frozenset(
    range(0x40, 0x50)
)


def modrm_forms(dense: bool) -> list[bytes]:
    """ModRM and SIB bytes: for every reg some memory forms and register forms."""
    if EXHAUSTIVE:
        return [
            bytes([m, sib])
            for m in range(256)
            for sib in ((0x4D,) if m & 7 != 4 else (0x25, 0x4D, 0x98))
        ]
    forms = []
    for reg in range(8):
        memory = [(0, 3, 0), (1, 4, 0x4D), (0, 5, 0), (2, 4, 0x65), (0, 4, 0x25)]
        registers = [(3, rm, 0) for rm in range(8)]
        if not dense:
            memory, registers = [memory[reg % 5]], [(3, reg ^ 1, 0)]
        for mod, rm, sib in memory + registers:
            head = bytes([mod << 6 | reg << 3 | rm])
            forms.append(head + bytes([sib]) if mod != 3 and rm == 4 else head)
    return forms


def shift_cases() -> Iterator[bytes]:
    """Shifts by an immediate: which flags change depends on the masked count."""
    for head, count in itertools.product((b"", b"\x66", b"\x48"), range(66)):
        for op, reg in itertools.product((b"\xc0", b"\xc1"), range(8)):
            yield head + op + bytes([0xC1 | reg << 3, count])
        for op in (b"\x0f\xa4", b"\x0f\xac"):
            yield head + op + bytes([0xD8, count])


def legacy_cases(bits: int) -> Iterator[bytes]:
    if bits == 64:
        heads = [(h, True) for h in HEADS_MAIN] + [(h, EXHAUSTIVE) for h in HEADS_MORE]
    else:
        heads = [(b"", True)] + [(h, EXHAUSTIVE) for h in HEADS_LEGACY_MODE]
    forms = {dense: modrm_forms(dense) for dense in (True, False)}
    for opmap, opcode in itertools.product(MAPS, range(256)):
        if not opmap and (opcode == 0x0F or (opcode in PREFIX_BYTES and bits == 64)):
            continue
        if opmap == b"\x0f" and opcode in (0x38, 0x3A):
            continue
        for head, dense in heads:
            start = head + opmap + bytes([opcode])
            for form in forms[dense]:
                yield (start + form + PAYLOAD)[:15]


def vex_cases(bits: int) -> Iterator[bytes]:
    forms = modrm_forms(EXHAUSTIVE)
    for opmap, opcode in itertools.product((1, 2, 3), range(256)):
        for pp, length, w in itertools.product(range(4), range(2), range(2)):
            for vvvv in (15, 9) if bits == 64 else (15, 3):
                rxb = 0xC0 if bits != 64 or (opcode ^ pp) & 1 else 0x40
                rxb |= 0x20 if bits != 64 or opcode & 2 else 0
                head = bytes([0xC4, rxb | opmap, w << 7 | vvvv << 3 | length << 2 | pp, opcode])
                for form in forms:
                    yield head + form + PAYLOAD[:8]
            two = bytes([0xC5, 0xF8 | length << 2 | pp, opcode])
            if opmap == 1 and w == 0:
                for form in forms:
                    yield two + form + PAYLOAD[:8]
    for spoiler in (b"\x66", b"\xf2", b"\xf3", b"\xf0", b"\x48", b"\x67", b"\x64", b"\x4026"):
        yield spoiler + bytes.fromhex("c5f858c1")
        yield spoiler + bytes.fromhex("c4e27058c1")


def evex_cases(bits: int) -> Iterator[bytes]:
    shapes = [
        bytes.fromhex(f) for f in ("03", "4c5511", "946511000000", "c1", "fb", "142d00000011")
    ]
    group = [bytes([0xC5 | reg << 3]) for reg in (0, 1, 2, 3, 4, 6)]
    masks = (0x00, 0x00, 0x01, 0x81, 0x10, 0x11, 0x91, 0x80)  # z, b, aaa; the first one plain
    maps = [(m, op) for m in (1, 2, 3, 5, 6) for op in range(256)]
    for (opmap, opcode), pp, w, n in itertools.product(maps, range(4), range(2), range(8)):
        if not EXHAUSTIVE and opmap != 1 and pp in (0, 3) and n > 3 and opcode & 1:
            continue
        forms = shapes + (group if opmap == 1 and opcode >> 2 == 0x71 >> 2 else [])
        vsib = opmap == 2 and opcode & 0xCC == 0x80  # gathers, scatters and neighbours
        for length in range(4):
            if n and not vsib and not EXHAUSTIVE and length != (n + opcode + pp) % 4:
                continue
            vvvv = 9 if n and not vsib and (n + opcode + pp) % 3 == 0 else 15
            high = not n or (n + opcode) % 4 != 0
            rxb = 0xF0 if bits != 64 or n & 1 == 0 else (0xF0, 0xD0, 0xB0, 0x70, 0xE0)[opcode % 5]
            head = bytes([0x62, rxb | opmap, w << 7 | vvvv << 3 | 4 | pp])
            head += bytes([masks[n] | length << 5 | high << 3, opcode])
            for form in forms if EXHAUSTIVE or vsib or not n else forms[n & 1 :: 2]:
                yield head + form + PAYLOAD[:3]


# ---- comparison --------------------------------------------------------------------------------

FLAG_BITS = {
    RflagsBits.CF: 0x001,
    RflagsBits.PF: 0x004,
    RflagsBits.AF: 0x010,
    RflagsBits.ZF: 0x040,
    RflagsBits.SF: 0x080,
    RflagsBits.DF: 0x400,
    RflagsBits.OF: 0x800,
}
GPRS = "RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15".split()
GPR_NUMBER = {getattr(Register, name): i for i, name in enumerate(GPRS)}
NO_REG, RIP = 0xFF, 0xFE
SEGMENTS = {
    Register.NONE: NO_REG,
    Register.ES: 0,
    Register.CS: 1,
    Register.SS: 2,
    Register.DS: 3,
    Register.FS: 4,
    Register.GS: 5,
}
READS = {OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
WRITES = {OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
KEEPS = {OpAccess.COND_WRITE}  # the old value may stay: counts as read


def flags(bits: int) -> int:
    return sum(ours for theirs, ours in FLAG_BITS.items() if bits & theirs)


def address_register(register: Any) -> int:
    if register == Register.NONE:
        return NO_REG
    if register in (Register.RIP, Register.EIP):
        return RIP
    return (
        GPR_NUMBER[RegisterExt.full_register(register)]
        if RegisterExt.is_gpr(register)
        else (RegisterExt.number(register))
    )


def access_bits(access: int) -> int:
    return (access in READS) | (access in WRITES) << 1


INFO = InstructionInfoFactory()


def memory_operand(instruction: Instruction) -> int | None:
    for i in range(instruction.op_count):
        if instruction.op_kind(i) == OpKind.MEMORY:
            return i
    return None


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def compare_memory(ours: Decoded, theirs: Instruction) -> Iterator[tuple[str, int, int]]:
    operand = memory_operand(theirs)
    yield "has_mem", ours.has_mem, operand is not None
    if operand is None:
        return
    info = INFO.info(theirs)
    yield "base", ours.base, address_register(theirs.memory_base)
    yield "index", ours.index, address_register(theirs.memory_index)
    if theirs.memory_index != Register.NONE:
        yield "scale", ours.scale, theirs.memory_index_scale
    displacement = theirs.memory_displacement
    if theirs.is_ip_rel_memory_operand:
        displacement -= theirs.next_ip
    width = 8 * ours.addr_size
    yield "disp", signed(ours.disp, width), signed(displacement, width)
    yield "mem_access", ours.mem_access, access_bits(info.op_access(operand))
    if ours.mem_access:
        yield "mem_size", ours.mem_size, MemorySizeExt.size(theirs.memory_size)


def compare_registers(ours: Decoded, theirs: Instruction) -> Iterator[tuple[str, int, int]]:
    read = written = 0
    for used in INFO.info(theirs).used_registers():
        if not RegisterExt.is_gpr(used.register):
            continue
        bit = 1 << GPR_NUMBER[RegisterExt.full_register(used.register)]
        partial = RegisterExt.size(used.register) < 4
        if used.access in READS or used.access in KEEPS:
            read |= bit
        if used.access in WRITES:
            written |= bit
            read |= bit if partial else 0
    yield (
        "gpr_read",
        ours.gpr_read & ~may_read_more(ours, theirs),
        read & ~may_read_more(ours, theirs),
    )
    yield "gpr_missed", 0, read & ~ours.gpr_read
    yield "gpr_written", ours.gpr_written, written


def may_read_more(ours: Decoded, theirs: Instruction) -> int:
    """Registers that we may list as read although iced does not; more is safe."""
    more = 0
    if theirs.op_register(0) == theirs.op_register(1) and theirs.op_count == 2:
        more |= ours.gpr_written  # XOR r, r does not depend on r
    if ours.op_size < 4:
        more |= ours.gpr_written  # RDTSC and others write 32 bits whatever the prefixes
    if not ours.mem_access:
        more |= sum(1 << r for r in (ours.base, ours.index) if r < 16)  # hint NOPs
    return more


def compare_places(ours: Decoded, theirs: Instruction) -> Iterator[tuple[str, int, int]]:
    """Every GPR place is an operand of iced's; iced's others are implicit (rAX, rCX, rDX)."""
    expected = set()
    for i in range(theirs.op_count):
        register = theirs.op_register(i) if theirs.op_kind(i) == OpKind.REGISTER else Register.NONE
        if RegisterExt.is_gpr(register):
            number = GPR_NUMBER[RegisterExt.full_register(register)]
            high = Register.AH <= register <= Register.BH
            expected.add((number, RegisterExt.size(register), high))
    found = {
        (ours.fields[p + "_reg"], ours.fields[p + "_size"], bool(ours.fields[p + "_high8"]))
        for p in ("reg", "rm", "vvvv", "opreg")
        if ours.fields[p + "_reg"] != NO_REG
    }
    unexplained = {e for e in expected - found if e[0] > 2}
    yield "places", len(found - expected) + len(unexplained), 0


def compare_flags(ours: Decoded, theirs: Instruction) -> Iterator[tuple[str, int, int]]:
    yield "flags_read", ours.flags_read, flags(theirs.rflags_read)
    modified = flags(theirs.rflags_modified)
    yield "flags_written", ours.flags_written, modified
    yield "flags_killed", ours.flags_killed, modified


def compare_layout(
    ours: Decoded, theirs: Instruction, decoder: Decoder
) -> Iterator[tuple[str, int, int]]:
    at = decoder.get_constant_offsets(theirs)
    yield "disp_off", ours.disp_off, at.displacement_offset if at.has_displacement else 0
    yield "disp_len", ours.disp_len, at.displacement_size
    if at.has_immediate:  # iced does not count a register in an immediate byte
        yield "imm_off", ours.imm_off, at.immediate_offset
        yield "imm_len", ours.imm_len, at.immediate_size + at.immediate_size2
    yield "lock", ours.lock, theirs.has_lock_prefix
    segment = SEGMENTS[theirs.segment_prefix]
    if theirs.code_size == CodeSize.CODE64 and segment < SEGMENTS[Register.FS]:
        segment = NO_REG  # ignored in 64-bit mode
    yield "segment", ours.segment, segment


def compare_immediate(ours: Decoded, theirs: Instruction) -> Iterator[tuple[str, int, int]]:
    if not ours.imm_len:
        return  # iced shows shifts by 1 with an immediate
    for i in range(theirs.op_count):
        kind = theirs.op_kind(i)
        if OpKind.IMMEDIATE8 <= kind <= OpKind.IMMEDIATE32TO64 and kind != OpKind.IMMEDIATE8_2ND:
            width = 8 * ours.op_size if kind >= OpKind.IMMEDIATE8TO16 else 8
            mask = (1 << max(width, 8)) - 1
            yield "imm", ours.imm & mask, theirs.immediate(i) & mask
            return
        if kind in (OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64):
            mask = {OpKind.NEAR_BRANCH16: 0xFFFF, OpKind.NEAR_BRANCH32: 0xFFFFFFFF}.get(kind, -1)
            yield "target", (theirs.next_ip + ours.imm) & mask, theirs.near_branch_target & mask


def compare_features(
    ours: Decoded, theirs: Instruction, names: list[str]
) -> Iterator[tuple[str, int, int]]:
    known = {FEATURE_NAMES[f] for f in theirs.cpuid_features()}
    known |= {FEATURE_ALIASES[name] for name in known & FEATURE_ALIASES.keys()}
    found = {names[f] for f in (ours.feature, ours.feature2) if f}
    yield "feature", len(found - known - IMPLIED), 0
    yield "feature_missing", len((known & set(names)) - found - IMPLIED), 0


#: iced's name of a feature that CPUID calls otherwise.
FEATURE_ALIASES = {"FPU287": "FPU", "FPU387": "FPU", "CMPXCHG16B": "CX16"}
#: Features that every CPU with the other feature of the instruction has.
IMPLIED = {"FPU", "AVX", "AVX512F"}

#: Differences that are meant: field, code (regular expressions), reason.
MEANT = [
    (r"flags_(written|killed)", r"^MOV_((CR|DR)_R|R(32|64)_(CR|DR))", "undefined; CPUs keep them"),
    (r"flags_killed", r"_CL$", "the count may be 0"),
    (r"flags_killed", r"^(CMPS|SCAS)", "under REP the count may be 0"),
    (r"gpr_.*", r"^SYS(CALL|RETD)$", "R11 too, harmless outside 64-bit mode"),
    (r"flags_.*", r"^RSM$", "undefined outside SMM"),
    (r"flags_read|gpr_.*", r"^INT(1|3|O|_IMM8)$", "pushes flags through the stack pointer"),
    (r"gpr_read", r"^(POPA|LEAVE)", "iced follows the stack's size, we list both registers"),
    (r"has_mem|base|index|mem_access", r"^XLAT_M8$", "memory without ModRM: MV_OP_XLAT"),
    (r"mem_access", r"^(CLFLUSH(OPT)?|CLWB)_M8$", "address only, see MV_OP_CLFLUSH"),
    (r"gpr_read", r"^UD[01]_", "class UD"),
    (r"places", r"^(LLDT|LTR|VERR|VERW|LMSW|LAR|LSL|MOV_SREG|ARPL)", "the source is 16 bits wide"),
    (r"places", r"^RESERVEDNOP", "iced names the register that a hint NOP ignores"),
    (r"places", r"(PINSR|PEXTR|EXTRACTPS|VMOVW)", "REX.W changes nothing: 32 bits"),
    (r"feature.*", r"^PADDQ_MM_MMM64$", "SSE2, as the manual's text says"),
]


def is_meant(field: str, code: str) -> bool:
    return any(re.fullmatch(f, field) and re.search(c, code) for f, c, _ in MEANT)


# ---- the tests --------------------------------------------------------------------------------


def full_comparison(
    ours: Decoded, theirs: Instruction, decoder: Decoder, names: list[str]
) -> Iterator[tuple[str, int, int]]:
    yield from compare_memory(ours, theirs)
    yield from compare_registers(ours, theirs)
    yield from compare_places(ours, theirs)
    yield from compare_flags(ours, theirs)
    yield from compare_layout(ours, theirs, decoder)
    yield from compare_immediate(ours, theirs)
    yield from compare_features(ours, theirs, names)


class Comparison:
    """Differences between both decoders by field: one line for each of iced's codes."""

    def __init__(self, c: CDecoder, bits: int) -> None:
        self.c, self.bits = c, bits
        self.differences: dict[tuple[str, str], str] = {}
        self._seen: set[tuple[int, ...]] = set()

    def run(self, cases: Iterable[bytes]) -> None:
        """Compares all cases, some 100,000 at a time."""
        cases = iter(cases)
        while chunk := list(itertools.islice(cases, 100_000)):
            batch = self.c.batch(chunk, self.bits)
            data = b"".join(case.ljust(16, b"\0") for case in chunk)
            decoder = Decoder(self.bits, data, DecoderOptions.FORCE_RESERVED_NOP)
            theirs = Instruction()
            for i, case in enumerate(chunk):
                decoder.position = 16 * i
                decoder.decode_out(theirs)
                if self._agree_on_length(case, batch, i, theirs):
                    self._compare_fields(case, batch, i, theirs, decoder)

    def _differ(self, field: str, code: str, text: str) -> None:
        self.differences.setdefault((field, code), text)

    def _agree_on_length(self, case: bytes, batch: Batch, i: int, theirs: Instruction) -> bool:
        status, length = batch.status_len(i)
        if theirs.code == Code.INVALID:
            if status == OK and self.c.classes[batch[i].cls] != "UD":
                name = self.c.name(batch[i].row)
                self._differ("only_ours", name, f"{case.hex()}: {name}, iced: undefined")
            return False
        name = CODE_NAMES[theirs.code]
        if name in HYPERCALLS:
            return False
        if not is_offered(theirs):
            if status == OK:
                self._differ("not_offered", name, f"{case.hex()}: {theirs}: not offered, yet a row")
            return False
        if status != OK:
            self._differ("only_theirs", name, f"{case.hex()}: {theirs}: undefined here")
            return False
        if length != theirs.len:
            self._differ("len", name, f"{case.hex()}: {theirs}: {length}, iced {theirs.len}")
            return False
        return True

    def _compare_fields(
        self, case: bytes, batch: Batch, i: int, theirs: Instruction, decoder: Decoder
    ) -> None:
        key = kind_of(theirs)
        if key in self._seen:
            return
        self._seen.add(key)
        name = CODE_NAMES[theirs.code]
        for field, x, y in full_comparison(batch[i], theirs, decoder, self.c.features):
            if x != y and not is_meant(field, name):
                self._differ(field, name, f"{case.hex()}: {theirs}: {field} {x:#x}, iced {y:#x}")


def kind_of(theirs: Instruction) -> tuple[int, ...]:
    """What makes an instruction worth a full comparison of its own."""
    return (
        theirs.code,
        theirs.len,
        theirs.memory_base,
        theirs.memory_index,
        theirs.segment_prefix,
        theirs.op0_register if theirs.op0_register <= Register.R15L else 0,  # AH or SPL?
        theirs.immediate8 if theirs.code in SHIFTS else 0,
    )


def assert_same(c: CDecoder, cases: Iterable[bytes], bits: int) -> None:
    comparison = Comparison(c, bits)
    comparison.run(cases)
    lines = [f"{field}: {text}" for (field, _), text in comparison.differences.items()]
    assert not lines, "\n".join(lines[:200])


@pytest.fixture(scope="module")
def c(tmp_path_factory: pytest.TempPathFactory) -> CDecoder:
    return CDecoder(tmp_path_factory.mktemp("decoder"))


def test_table_every_row_is_reached(c: CDecoder) -> None:
    seen: set[int] = set()
    for bits in (64, 32):
        for cases in (legacy_cases(bits), vex_cases(bits), evex_cases(bits)):
            seen |= c.rows_reached(list(cases), bits)
    unreached = [f"{row} {c.name(row)}" for row in range(1, c.row_count) if row not in seen]
    assert not unreached


@pytest.mark.parametrize("bits", [64, 32, 16])
def test_decode_legacy_encodings_agree_with_iced(c: CDecoder, bits: int) -> None:
    assert_same(c, legacy_cases(bits), bits)


def test_decode_shift_flags_agree_with_iced(c: CDecoder) -> None:
    assert_same(c, shift_cases(), 64)


@pytest.mark.parametrize("bits", [64, 32])
def test_decode_evex_encodings_agree_with_iced(c: CDecoder, bits: int) -> None:
    assert_same(c, evex_cases(bits), bits)


@pytest.mark.parametrize("bits", [64, 32])
def test_decode_vex_encodings_agree_with_iced(c: CDecoder, bits: int) -> None:
    assert_same(c, vex_cases(bits), bits)
