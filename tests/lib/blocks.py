"""Random blocks of user-level code, for the silicon and the translator (microvm.testing.silicon).

A program is lines of assembly. Registers have roles, so that a program mostly stays in its
sandbox and the translator finds what it looks for: runs of accesses off one base register, bases
that move by constants, flags that live over accesses.

    bases     rbx rbp rsi rdi r14 r8 rsp, moved by constants alone; r13 lies at some edge
    indices   r15, rcx: small
    values    rax rdx r9 r10 r11 r12, and their parts
"""

from __future__ import annotations

import random
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from microvm._native import ffi, lib
from microvm.testing import silicon

CODE: Final[int] = lib.MV_SI_CODE
DATA: Final[int] = lib.MV_SI_DATA
DATA_END: Final[int] = DATA + lib.MV_SI_DATA_SIZE
RO: Final[int] = lib.MV_SI_RO
STACK: Final[int] = lib.MV_SI_STACK

_NUMBERS: Final = {
    name: number
    for number, name in enumerate(
        "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
    )
}
_BASES: Final = "rbx rbp rsi rdi r14 r8 rsp".split()
_LOW_BASES: Final = "rbx rbp rsi rdi rsp".split()  # none needs a REX prefix
_PARTS: Final = {
    8: "rax rdx r9 r10 r11 r12".split(),
    4: "eax edx r9d r10d r11d r12d".split(),
    2: "ax dx r9w r10w r11w r12w".split(),
    1: "al dl r9b r10b r11b r12b".split(),
}
#: Guest registers that the translator keeps for itself, as sources.
_SCRATCH: Final = {8: ["r14", "r15"], 4: ["r14d", "r15d"], 2: ["r14w", "r15w"], 1: ["r14b", "r15b"]}
_PTR: Final = {1: "byte", 2: "word", 4: "dword", 8: "qword", 16: "xmmword", 32: "ymmword"}
_CONDITIONS: Final = "o no b nb z nz be nbe s ns p np l nl le nle".split()
_ARITH: Final = "add or adc sbb and sub xor cmp".split()


@dataclass(frozen=True, slots=True)
class Program:
    """Lines of assembly and where and with what they begin."""

    lines: tuple[str, ...]
    seed: str
    rip: int

    def __str__(self) -> str:
        return f"rip {self.rip:#x}, seed {self.seed}\n    " + "\n    ".join(self.lines)


class _Writer:
    """Writes a program line by line."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.lines: list[str] = []
        self.labels = 0
        self.subroutines: list[str] = []
        self.in_loop = False
        #: Accesses come in runs off one base.
        self.base = "rbx"

    def label(self) -> str:
        self.labels += 1
        return f"L{self.labels}"

    def size(self) -> int:
        return self.rng.choice((1, 2, 4, 4, 8, 8))

    def value(self, size: int, *, read_only: bool = False) -> str:
        """A register to use; r14 and r15 only where they are not changed."""
        if read_only and self.rng.random() < 0.3:
            return self.rng.choice(_SCRATCH[size])
        return self.rng.choice(_PARTS[size])

    def mem(self, size: int, *, low: bool = False) -> str:
        """A memory operand; low: addressable without REX."""
        rng = self.rng
        if rng.random() < 0.3:
            self.base = rng.choice(_BASES)
        base = self.base
        if low and base not in _LOW_BASES:
            base = rng.choice(_LOW_BASES)
        if rng.random() < 0.02 and not low:
            base = "r13"
        disp = rng.choice((0, 8 * rng.randrange(-8, 8), rng.randrange(-64, 64)))
        if rng.random() < 0.1:
            disp = rng.randrange(-0x300, 0x300)
        kind = rng.random()
        if kind < 0.72:
            where = f"{base}{disp:+d}"
        elif kind < 0.84:
            scale = rng.choice((1, 2, 4, 8))
            index = rng.choice(("rcx",) if low else ("r15", "rcx"))
            where = f"{base}+{index}*{scale}{disp:+d}"
        elif kind < 0.87:
            where = f"{DATA + 0x500 + disp}"
        elif kind < 0.90:
            where = f"rip{DATA + 0x700 - CODE - 0x1000 + disp:+d}"
        elif kind < 0.92:
            where = f"rcx*4{DATA + 0x500 + disp:+d}"
        elif kind < 0.94:
            return f"{_PTR[size]} ptr gs:[{0x600 + disp}]"
        elif kind < 0.96:
            return f"{_PTR[size]} ptr gs:[rcx*8{0x600 + disp:+d}]"
        elif kind < 0.98 and not low:
            where = f"{base}+r15*2{disp:+d}"
        else:
            short = {"r14": "r14d", "r8": "r8d", "r13": "r13d"}.get(base, "e" + base[1:])
            where = f"{short}{disp:+d}"
        return f"{_PTR[size]} ptr [{where}]"

    def immediate(self, size: int) -> int:
        rng = self.rng
        bits = min(8 * size, 32)
        value = rng.choice((rng.randrange(-128, 128), rng.getrandbits(bits)))
        limit = 1 << (bits - 1)
        return (value + limit) % (2 * limit) - limit

    # ---- kinds of instructions ----------------------------------------------

    def load(self) -> None:
        size = self.size()
        op = self.rng.choice([*_ARITH, "mov", "mov", "mov", "test", "xchg"])
        if op in ("test", "xchg"):
            self.add(f"{op} {self.mem(size)}, {self.value(size, read_only=op == 'test')}")
        elif op == "cmp":
            self.add(f"cmp {self.value(size, read_only=True)}, {self.mem(size)}")
        else:
            self.add(f"{op} {self.value(size)}, {self.mem(size)}")

    def store(self) -> None:
        size = self.size()
        op = self.rng.choice([*_ARITH, "mov", "mov", "mov"])
        source = self.value(size, read_only=True)
        if self.rng.random() < 0.3:
            source = str(self.immediate(size))
        lock = "lock " if op not in ("mov", "cmp") and self.rng.random() < 0.2 else ""
        self.add(f"{lock}{op} {self.mem(size)}, {source}")

    def unary(self) -> None:
        op = self.rng.choice("inc dec neg not".split())
        lock = "lock " if self.rng.random() < 0.2 else ""
        self.add(f"{lock}{op} {self.mem(self.size())}")

    def shift(self) -> None:
        op = self.rng.choice("rol ror rcl rcr shl shr sar".split())
        count = self.rng.choice(("cl", "1", str(self.rng.randrange(70))))
        size = self.size()
        place = self.mem(size) if self.rng.random() < 0.6 else self.value(size)
        self.add(f"{op} {place}, {count}")
        if count != "1":
            self.defined()  # OF is not

    def double_shift(self) -> None:
        size = self.rng.choice((2, 4, 8))
        count = self.rng.choice(("cl", str(self.rng.randrange(8 * size))))
        op = self.rng.choice(("shld", "shrd"))
        source = self.value(size, read_only=True)
        if size == 2:
            count = str(self.rng.randrange(16))  # more is undefined
        self.add(f"{op} {self.mem(size)}, {source}, {count}")
        self.defined()

    def high_byte(self) -> None:
        reg = self.rng.choice("ah dh".split())
        mem = self.mem(1, low=True)
        op = self.rng.choice([*_ARITH, "mov", "mov"])
        first, second = (reg, mem) if self.rng.random() < 0.5 else (mem, reg)
        self.add(f"{op} {first}, {second}")

    def bit(self) -> None:
        size = self.rng.choice((2, 4, 8))
        op = self.rng.choice("bt bts btr btc".split())
        lock = "lock " if op != "bt" and self.rng.random() < 0.2 else ""
        if self.rng.random() < 0.3:
            self.add(f"{lock}{op} {self.mem(size)}, {self.rng.randrange(64)}")
            self.defined()
            return
        reg = self.rng.choice(_PARTS[size] + _SCRATCH[size][1:])
        if reg not in _SCRATCH[size]:
            self.add(f"mov {self.wide(reg)}, {self.rng.randrange(-900, 900)}")
            if self.rng.random() < 0.5:
                self.flags()
        self.add(f"{lock}{op} {self.mem(size)}, {reg}")
        self.defined()

    def defined(self) -> None:
        """Carry is used; the other flags are undefined here, and are made anew."""
        self.add(f"adc {self.value(8)}, {self.value(8, read_only=True)}")

    def wide(self, reg: str) -> str:
        for size in (1, 2, 4, 8):
            if reg in _PARTS[size]:
                return _PARTS[8][_PARTS[size].index(reg)]
        return reg

    def exchange(self) -> None:
        size = self.size()
        op = self.rng.choice(("cmpxchg", "xadd", "xchg"))
        lock = "lock " if op != "xchg" and self.rng.random() < 0.5 else ""
        self.add(f"{lock}{op} {self.mem(size)}, {self.value(size, read_only=op == 'cmpxchg')}")

    def extend(self) -> None:
        op, size = self.rng.choice((("movzx", 1), ("movzx", 2), ("movsx", 1), ("movsx", 2)))
        self.add(f"{op} {self.value(self.rng.choice((4, 8)))}, {self.mem(size)}")
        if self.rng.random() < 0.3:
            self.add(f"movsxd {self.value(8)}, {self.mem(4)}")

    def multiply(self) -> None:
        size = self.rng.choice((2, 4, 8))
        if self.rng.random() < 0.5:
            self.add(f"imul {self.value(size)}, {self.mem(size)}, {self.rng.randrange(-99, 99)}")
        else:
            self.add(f"{self.rng.choice(('mul', 'imul'))} {self.mem(size)}")
        self.defined()

    def divide(self) -> None:
        self.add("xor edx, edx")
        self.add(f"div {self.mem(self.rng.choice((4, 8)))}")
        self.add("cmp rax, rdx")  # flags are undefined after DIV

    def conditional(self) -> None:
        cc = self.rng.choice(_CONDITIONS)
        size = self.rng.choice((2, 4, 8))
        kind = self.rng.randrange(3)
        if kind == 0:
            self.add(f"set{cc} {self.mem(1)}")
        elif kind == 1:
            self.add(f"cmov{cc} {self.value(size)}, {self.mem(size)}")
        else:
            self.add(f"set{cc} {self.rng.choice(['ah', 'dl', 'r9b'])}")

    def flags(self) -> None:
        """Sets flags, or uses them, without memory."""
        rng = self.rng
        a, b = self.value(8), self.value(8, read_only=True)
        self.add(
            rng.choice(
                (
                    f"cmp {a}, {b}",
                    f"add {a}, {b}",
                    f"adc {a}, {b}",
                    f"sbb {a}, {b}",
                    f"test {a}, {a}",
                    f"inc {a}",
                    "stc",
                    "cmc",
                    "clc",
                    "lahf",
                    "sahf",
                    f"rcl {a}, 1",
                    f"set{rng.choice(_CONDITIONS)} {rng.choice(_PARTS[1])}",
                    f"mov {a}, {b}",
                    f"lea {a}, [{rng.choice(_BASES)}+r15*4+5]",
                    f"lea {a}, [r14+r15]",
                    f"xchg {a}, {self.value(8)}",
                    f"bswap {a}",
                    f"mov {a}, {rng.getrandbits(64)}",
                    f"adcx {a}, r14",
                    f"mulx {a}, r12, r15",
                    f"andn {a}, r14, r15",
                )
            )
        )

    def move_base(self) -> None:
        base = self.rng.choice(_BASES)
        by = 8 * self.rng.randrange(-4, 5) if base == "rsp" else self.rng.randrange(-40, 41)
        if base == "rsp" or self.rng.random() < 0.4:
            self.add(f"lea {base}, [{base}{by:+d}]")
        else:
            self.add(f"{self.rng.choice(('add', 'sub'))} {base}, {by}")

    def stack(self) -> None:
        rng = self.rng
        kind = rng.randrange(8)
        if kind == 0:
            self.add(f"push {rng.choice([*_BASES, 'r15', 'r9', 'rax'])}")
            self.inner()
            self.add(f"pop {rng.choice(_PARTS[8])}")
        elif kind == 1:
            self.add(f"push {self.mem(8)}")
            self.add(f"pop {self.mem(8)}")
        elif kind == 2:
            self.add(f"push {self.immediate(4)}")
            self.inner()
            self.add(f"pop {self.mem(8)}")
        elif kind == 3:
            self.add("push r14")
            self.add("push r15")
            self.inner()
            self.add("pop r15")
            self.add("pop r14")
        elif kind == 4:
            self.add("push rbp")
            self.add("mov rbp, rsp")
            self.inner()
            self.add("leave")
        elif kind == 5:
            self.add("pushfq")
            self.add(f"and dword ptr [rsp], {0x8D5 | 2}")
            self.add("popfq")
        elif kind == 6:
            self.add(f"push {rng.choice(('ax', 'r14w', 'bx'))}")
            self.add(f"pop {rng.choice(('dx', 'r9w'))}")
        else:
            self.add("push rsp")
            self.add("pop rax")
            self.add("mov rax, 77")

    def call(self) -> None:
        name = self.label()
        outer, self.lines = self.lines, []
        for _ in range(self.rng.randrange(1, 4)):
            self.inner()
        body = [f"{name}:", *self.lines, self.rng.choice(("ret", "ret", "ret 8"))]
        self.lines = outer
        self.subroutines += body
        if body[-1] == "ret 8":
            self.add("push 5")
        kind = self.rng.randrange(3)
        if kind == 0:
            self.add(f"call {name}")
        elif kind == 1:
            reg = self.rng.choice(("rax", "r12"))
            self.add(f"lea {reg}, [rip+{name}]")
            self.add(f"call {reg}")
        else:
            self.add(f"lea rax, [rip+{name}]")
            self.add(f"mov [{self.base}], rax")
            self.add(f"call [{self.base}]")

    def jump(self) -> None:
        to = self.label()
        kind = self.rng.randrange(5)
        if kind < 3:
            self.add(f"j{self.rng.choice(_CONDITIONS)} {to}")
        elif kind == 3:
            self.add(f"lea r9, [rip+{to}]")
            self.add("jmp r9")
        else:
            self.add(f"jrcxz {to}")
        for _ in range(self.rng.randrange(3)):
            self.inner()
        self.add(f"{to}:")

    def loop(self) -> None:
        if self.in_loop:
            return
        self.in_loop = True
        top, rounds = self.label(), self.rng.randrange(2, 7)
        by_loop = self.rng.random() < 0.5
        self.add(f"mov ecx, {rounds}")
        self.add(f"{top}:")
        for _ in range(self.rng.randrange(1, 5)):
            self.inner()
        if by_loop:
            self.add(f"loop {top}")
        else:
            self.add("dec ecx")
            self.add(f"jnz {top}")
        self.in_loop = False

    def string(self) -> None:
        if self.in_loop:
            return
        op = self.rng.choice("movs stos lods scas cmps".split())
        suffix = self.rng.choice("bwdq")
        rep = self.rng.choice(("", "rep ", "repne "))
        if op not in ("scas", "cmps") and rep:
            rep = "rep "
        backwards = self.rng.random() < 0.2
        if backwards:
            self.add("std")
        self.add(f"mov ecx, {self.rng.choice((0, 1, 3, 9, 17))}")
        self.add(f"{rep}{op}{suffix}")
        if backwards:
            self.add("cld")
        self.add(f"mov ecx, {self.rng.randrange(20)}")

    def vector(self) -> None:
        rng = self.rng
        x, y = rng.randrange(16), rng.randrange(16)
        m4, m8, m16 = self.mem(4), self.mem(8), self.mem(16)
        self.add(
            rng.choice(
                (
                    f"movups xmm{x}, {m16}",
                    f"movups {m16}, xmm{x}",
                    f"movq xmm{x}, {m8}",
                    f"movq {m8}, xmm{x}",
                    f"movd {m4}, xmm{x}",
                    f"lddqu xmm{x}, {m16}",
                    f"movhps xmm{x}, {m8}",
                    f"movlps {m8}, xmm{x}",
                    f"addsd xmm{x}, {m8}",
                    f"ucomisd xmm{x}, {m8}",
                    f"cvtsi2sd xmm{x}, {m8}",
                    f"cvttsd2si {self.value(8)}, {m8}",
                    f"movq {self.value(8)}, xmm{x}",
                    f"movq xmm{x}, r14",
                    f"paddd xmm{x}, xmm{y}",
                    f"vpxor xmm{x}, xmm{y}, {m16}",
                    f"vmovdqu ymm{x}, {self.mem(32)}",
                    f"vmovdqu {self.mem(32)}, ymm{x}",
                    f"vpaddq ymm{x}, ymm{y}, {self.mem(32)}",
                    f"vpinsrq xmm{x}, xmm{y}, r15, 1",
                    f"movaps xmm{x}, {m16}",
                )
            )
        )

    def x87(self) -> None:
        self.add(f"fld {self.mem(8)}")
        self.add(f"{self.rng.choice(('fstp', 'fistp'))} {self.mem(8)}")

    def wide_exchange(self) -> None:
        self.add(f"lock cmpxchg16b {self.mem(16)}" if self.rng.random() < 0.5 else "nop")

    def index(self) -> None:
        self.add(f"mov r15d, {self.mem(4)}")
        self.add("and r15d, 31")

    def moffs(self) -> None:
        at, reg = DATA + 0x480 + self.rng.randrange(64), self.rng.choice(("al", "ax", "eax", "rax"))
        self.add(f"movabs {reg}, [{at}]" if self.rng.random() < 0.5 else f"movabs [{at}], {reg}")

    def inner(self) -> None:
        """Something without labels."""
        self.rng.choice(_SIMPLE)(self)

    def add(self, line: str) -> None:
        self.lines.append(line)


_W = _Writer
_SIMPLE: Final = [
    *(_W.load, _W.load, _W.load, _W.store, _W.store, _W.store, _W.flags, _W.flags, _W.flags),
    *(_W.unary, _W.shift, _W.double_shift, _W.high_byte, _W.high_byte, _W.bit, _W.exchange),
    *(_W.extend, _W.multiply, _W.conditional, _W.conditional, _W.move_base, _W.vector),
    *(_W.vector, _W.index, _W.moffs),
]
_ALL: Final = [
    *(_SIMPLE * 2),
    *(_W.stack, _W.stack, _W.stack, _W.stack, _W.call, _W.call, _W.jump, _W.jump, _W.jump),
    *(_W.loop, _W.loop, _W.string, _W.string, _W.string, _W.x87, _W.divide, _W.wide_exchange),
]


def write_program(seed: str) -> Program:
    """The program of a seed, always the same one."""
    rng = random.Random(seed)
    writer = _Writer(rng)
    for _ in range(rng.randrange(4, 40)):
        rng.choice(_ALL)(writer)
    lines = (*writer.lines, "int3", *writer.subroutines)
    if rng.random() < 0.5:
        rip = CODE + 0x1000 - rng.randrange(0x100)
    else:
        rip = CODE + 0x200 + rng.randrange(0x400)
    return Program(lines, seed, rip)


def assemble(programs: Sequence[Program]) -> list[bytes]:
    """Code of each program; it may lie anywhere. A call of the assembler for all."""
    source = [".intel_syntax noprefix\n.code64\n"]
    for number, program in enumerate(programs):
        body = "\n".join(program.lines)
        source.append(re.sub(r"\bL(\d+)\b", rf".L{number}_\1", body))
        source.append(f"\n.byte 0x0f, 0x0b\n.long {number:#x}, 0x5eed5eed\n")
    with tempfile.TemporaryDirectory() as folder:
        obj, out = Path(folder, "o"), Path(folder, "bin")
        text = "\n".join(source)
        for command in (
            ["as", "--64", "-mrelax-relocations=no", "-o", str(obj), "-"],
            ["objcopy", "-O", "binary", "-j", ".text", str(obj), str(out)],
        ):
            done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
            if done.returncode:
                raise AssertionError(f"{done.stderr[:2000]}")
        flat = out.read_bytes()
    parts, at = [], 0
    for number in range(len(programs)):
        mark = b"\x0f\x0b" + number.to_bytes(4, "little") + b"\xed\x5e\xed\x5e"
        end = flat.index(mark, at)
        parts.append(flat[at:end])
        at = end + len(mark)
    return parts


def in_sandbox(address: int) -> bool:
    """Where both worlds have the same pages, and the same holes."""
    return CODE <= address < STACK + 0x10000


_ENCODING: Final = silicon.Encoding(0, "block", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, has_mem=True)


def make_case(program: Program, code: bytes, xcr0: int) -> silicon.Case:
    """The program with its registers and memory, which come from its seed as well."""
    rng = random.Random(f"{program.seed}/state")
    raw = ffi.new("struct mv_si_case *")
    state = getattr(raw, "in")
    gpr = [silicon._random_gpr(rng) for _ in range(16)]
    edges = (DATA, DATA_END, RO + 0x20, RO + 0x1000, DATA + 0x1000, STACK + 0x1000)
    for name, at in {
        "rbx": DATA + 0x800 + rng.randrange(64),
        "rbp": DATA + 0x1000 + rng.randrange(-64, 64),
        "rsi": DATA + 0x600 + rng.randrange(0x200),
        "rdi": DATA + 0x1000 + rng.randrange(0x800),
        "r14": DATA + 0xFC0 + rng.randrange(128),
        "r8": STACK + 0x400 + 8 * rng.randrange(64),
        "rsp": STACK + 0x900 + rng.choice((0, 0, 0, 8, 1)),
        "r13": rng.choice(edges) + rng.randrange(-40, 8),
        "rcx": rng.randrange(20),
        "r15": rng.randrange(32),
    }.items():
        gpr[_NUMBERS[name]] = at
    state.gpr = gpr
    state.rip, state.rflags = program.rip, 0x202 | rng.getrandbits(12) & 0x8D5
    image = silicon._xsave(rng, xcr0)
    image[0:2] = (0x37F).to_bytes(2, "little")  # no exceptions: they are cases of their own
    image[24:28] = (0x1F80).to_bytes(4, "little")
    ffi.memmove(state.xsave, image, len(image))
    for area in (state.data, state.stack):
        ffi.memmove(area, rng.randbytes(len(area)), len(area))
    ffi.memmove(raw.code, code, len(code))
    raw.code_len = len(code)
    return silicon.Case(_ENCODING, program.seed, code, raw)
