"""Interrupt storms on the translator: what is interrupted, whenever and how often, must not notice.

Each loop ends in an equality that holds only if no flag and no register was ever lost. Interrupts
come from a fast timer, from a line that another thread toggles, and from kicks of a third; each
makes polls and block entries take their rare ways.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from microvm._native import lib
from microvm.layout import GSI_VIRTIO, IOAPIC_GPA
from microvm.testing.bare import CODE, DATA, Bare, P, W

VECTOR = 0x40
INTERRUPTS = 500  #: for which a loop is run again and again
HANDLER = CODE + 0x8000
#: Two pages of code whose addresses are equal in the low 16 bits: they collide in the jump cache.
TWINS = (0x400000, 0x410000, 0x420000)

#: Switches that must change nothing but speed.
OPTIONS: dict[str, dict[str, int]] = {
    "default": {},
    "no-chain": {"no_chain": 1},
    "one-instruction-blocks": {"max_insns": 1},
    "no-coalesce": {"no_coalesce": 1, "no_flags_live": 1},
    "tiny-cache": {"cache_bytes": 256 << 10},
}

PRELUDE = f"""
.set APIC_BASE, 0x1b
.macro wrmsr_imm msr, value
  mov ecx, \\msr
  mov eax, \\value
  xor edx, edx
  wrmsr
.endm
.macro storm period
  mov ecx, APIC_BASE
  rdmsr
  or eax, 0xc00
  wrmsr
  wrmsr_imm 0x80f, 0x1ff             # on
  wrmsr_imm 0x83e, 0xb               # divide by 1: a tick is a nanosecond
  wrmsr_imm 0x832, {1 << 17 | VECTOR}   # periodic
  mov rbx, {IOAPIC_GPA}
  mov dword ptr [rbx], {0x11 + 2 * GSI_VIRTIO}
  mov dword ptr [rbx + 0x10], 0
  mov dword ptr [rbx], {0x10 + 2 * GSI_VIRTIO}
  mov dword ptr [rbx + 0x10], {VECTOR}
  wrmsr_imm 0x838, \\period
  sti
.endm
"""
#: Ruins all flags and the scratch registers, and puts them back; counts in memory.
HANDLER_CODE = f"""
push rax
push rcx
push rdx
push r14
push r15
lock inc dword ptr [{DATA + 0xF0000}]
xor r14d, r14d
dec r14
mov r15, r14
add r15, r14
mov ecx, 0x80b
xor eax, eax
xor edx, edx
wrmsr
sub eax, 1
pop r15
pop r14
pop rdx
pop rcx
pop rax
iretq
"""

#: Loops of about r12 rounds; they jump to `bad` when something is lost.
LOOPS = {
    "equality": """
      xor eax, eax
      xor ebx, ebx
      1: inc eax
      lea ebx, [rbx + 1]
      cmp eax, ebx
      jne bad
      cmp rax, r12
      jne 1b
    """,
    "carry": """
      # A 256-bit counter by an ADC chain whose flags live over everything.
      xor eax, eax
      xor ebx, ebx
      xor ecx, ecx
      mov rdi, -1
      mov rsi, r12
      1: add rdi, 1
      adc rax, 0
      lea rdi, [rdi - 1]
      adc rbx, 0
      mov rdx, [DATA]
      adc rcx, 0
      lea rsi, [rsi - 1]
      jc bad
      xchg rsi, rcx
      jrcxz 2f
      xchg rsi, rcx
      jmp 1b
      2: xchg rsi, rcx
      cmp rax, r12
      jne bad
      or rbx, rcx
      jnz bad
    """,
    "flags-over-memory": """
      xor ebx, ebx
      mov rsi, r12
      1: cmp esi, 1           # carry if 0, zero if 1
      mov rax, [DATA + 8]
      mov [DATA + 16], rsi
      mov r14, [DATA + 24]
      push rsi
      pop rdx
      jb bad
      je 2f
      setne al
      movzx eax, al
      add rbx, rax
      dec rsi
      jmp 1b
      2: lea rbx, [rbx + 1]
      cmp rbx, r12
      jne bad
    """,
    "strings": """
      mov rbp, r12
      1: mov esi, DATA + 0x2000
      mov edi, DATA + 0x3000
      mov ecx, 0x1201
      cmp ebp, ebp            # carry clear, zero set: MOVS keeps them
      rep movsb
      jne bad
      jc bad
      cmp edi, DATA + 0x4201
      jne bad
      mov edi, DATA + 0x3000
      mov ecx, 40
      mov al, 0x5a
      stc
      rep stosb
      jnc bad
      cmp byte ptr [DATA + 0x3027], 0x5a
      jne bad
      sub ebp, 64
      ja 1b
    """,
    "calls": """
      xor ebx, ebx
      mov rbp, rsp
      mov rsi, r12
      1: call 3f
      stc
      call 4f
      jnc bad
      cmp rsp, rbp
      jne bad
      dec rsi
      jnz 1b
      imul rax, r12, 3
      cmp rax, rbx
      jne bad
      jmp 5f
      3: inc rbx
      ret
      4: lea rbx, [rbx + 2]
      ret
      5:
    """,
    "colliding-jumps": """
      # Targets that share an entry of the jump cache; each keeps flags and RCX.
      xor ebx, ebx
      mov rsi, r12
      mov rcx, 0x1122334455667788
      1: mov rdx, TWIN0
      cmp rbx, rbx
      stc
      call rdx
      jnc bad
      jnz bad
      mov rdx, TWIN1
      call rdx
      jnc bad
      mov rdx, TWIN2
      clc
      call rdx
      jc bad
      jnz bad
      mov rax, 0x1122334455667788
      cmp rax, rcx
      jne bad
      dec rsi
      jnz 1b
      imul rax, r12, 0x111
      cmp rax, rbx
      jne bad
    """,
    "scratch-registers": """
      mov r14, r12
      xor r15d, r15d
      1: lea r15, [r15 + r14]
      mov [DATA + 8], r15
      mov [DATA + 0x5000], r14
      sub r15, r14
      cmp r15, [DATA + 8]
      je bad
      inc r15
      dec r14
      jnz 1b
      cmp r15, r12
      jne bad
    """,
}


@contextmanager
def running(*actions: object) -> Iterator[None]:
    """Threads that call each action again and again."""
    stop = threading.Event()

    def again(action: object) -> None:
        while not stop.is_set():
            action()  # type: ignore[operator]
            time.sleep(0.0002)

    threads = [threading.Thread(target=again, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def prepare(machine: Bare, body: str, rounds: int, *, period: int, interrupts: int) -> None:
    machine.map(IOAPIC_GPA, IOAPIC_GPA, 0x1000, P | W)
    machine.set_gate(VECTOR, HANDLER)
    machine.load(HANDLER_CODE, HANDLER)
    for number, at in enumerate(TWINS):
        machine.load(f"lea rbx, [rbx + {0x10**number}]\n ret", at)
    names = "".join(f".set TWIN{number}, {at}\n" for number, at in enumerate(TWINS))
    machine.write(DATA + 0xF0000, bytes(8))
    machine.load(
        f"{PRELUDE} .set DATA, {DATA}\n {names} storm {period}\n"
        f"again: mov r12d, {rounds}\n {body}\n"
        f"cmp dword ptr [DATA + 0xf0000], {interrupts}\n jb again\n"
        "cli\n mov r13d, 1\n done\n bad: cli\n mov r13d, 2\n done"
    )
    machine.regs.r13 = 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("loop", LOOPS)
def test_storm_of_interrupts_disturbs_nothing(loop: str, options: dict[str, int]) -> None:
    rounds = 2000 if "no_chain" in options else 20_000
    with Bare("dbt", options=options) as machine:
        prepare(machine, LOOPS[loop], rounds, period=20_000, interrupts=INTERRUPTS)
        line = [False]

        def toggle() -> None:
            line[0] = not line[0]
            machine.irq(GSI_VIRTIO, line[0])

        with running(toggle):
            out = machine.go(timeout=30)
        assert (out.reason, machine.regs.r13) == ("done", 1)


@pytest.mark.parametrize("loop", LOOPS)
def test_storm_of_kicks_and_device_writes_disturbs_nothing(loop: str) -> None:
    with Bare("dbt") as machine:
        prepare(machine, LOOPS[loop], 1_000_000, period=50_000, interrupts=0)
        test = machine._test

        def written() -> None:  # the loop's code goes away under it, and is the same again
            lib.mv_test_ram_written(test, CODE, 0x1000)

        with running(machine.kick, written):
            deadline = time.monotonic() + 30
            while (out := machine.go(timeout=10)).reason == "kicked":
                assert time.monotonic() < deadline
        assert (out.reason, machine.regs.r13) == ("done", 1)
