"""Hand-over of a vCPU from KVM to the translator: one instruction, or for good.

That it can be done in the middle of anything shows that the state format is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from microvm._native import lib
from microvm.accel import probe_kvm
from microvm.layout import GSI_VIRTIO, IOAPIC_GPA
from microvm.testing.bare import CODE, DATA, Bare, P, W

HANDLER = CODE + 0x8000
VECTOR = 0x40
#: The local APIC on, as x2APIC, KVM's PIC masked. SDM 3A table 11-6.
APIC_ON = """
.macro wrmsr_imm msr, value
  mov ecx, \\msr
  mov eax, \\value
  xor edx, edx
  wrmsr
.endm
mov ecx, 0x1b
rdmsr
or eax, 0xc00
wrmsr
wrmsr_imm 0x80f, 0x1ff
wrmsr_imm 0x835, 0x10000
"""
EOI = "push rax\n push rcx\n push rdx\n mov ecx, 0x80b\n xor eax, eax\n xor edx, edx\n wrmsr\n"
EOI += "pop rdx\n pop rcx\n pop rax\n"


@pytest.fixture(params=["step", "auto"])
def machine(request: pytest.FixtureRequest) -> Iterator[Bare]:
    """A machine on KVM that may be handed over."""
    if (probe := probe_kvm()).verdict not in ("good", "useless"):
        pytest.skip(probe.reason)
    with Bare("kvm", handover=request.param) as machine:
        yield machine


@pytest.fixture
def emulated(machine: Bare) -> Bare:
    """The same, on a KVM that gives up on instructions."""
    if probe_kvm().verdict != "useless":
        pytest.skip("this KVM has hardware under it and never gives up")
    return machine


def test_handover_step_executes_what_kvm_cannot(emulated: Bare) -> None:
    emulated.write(DATA, (5).to_bytes(16, "little"))
    out = emulated.run_code(
        f"""
        mov rdi, {DATA}
        mov eax, 5
        xor edx, edx
        mov ebx, 7
        mov ecx, 9
        lock cmpxchg16b [rdi]
        setz r8b
        done
        """
    )
    assert (out.reason, emulated.regs.r8 & 0xFF) == ("done", 1)
    assert emulated.read(DATA, 16) == (7 | 9 << 64).to_bytes(16, "little")
    assert emulated.stats().exits[lib.MV_EXIT_EMULATE] == 1


def test_handover_step_delivers_the_exception_that_the_instruction_raises(emulated: Bare) -> None:
    out = emulated.run_code("mov rdi, 0x7000000000\n lock cmpxchg16b [rdi]\n done")
    assert (out.vector, out.error) == (14, 2)
    assert emulated.sregs.cr2 == 0x7000000000


def test_handover_step_sees_code_that_the_guest_has_changed(emulated: Bare) -> None:
    # A VEX instruction in a loop, whose immediate byte changes between rounds.
    out = emulated.run_code(
        """
        mov rax, cr4
        bts rax, 18
        mov cr4, rax
        xor ecx, ecx
        xor edx, edx
        mov eax, 7
        xsetbv
        mov ebp, 3
        mov eax, 0x1000
        1: rorx ebx, eax, 1
        inc byte ptr [rip + 1b + 5]
        dec ebp
        jnz 1b
        done
        """
    )
    assert out.reason == "done"
    assert emulated.regs.rbx == 0x1000 >> 3


def test_handover_many_steps_keep_vector_state(emulated: Bare) -> None:
    emulated.set_gate(3, HANDLER)
    emulated.load("paddd xmm1, xmm0\n iretq", HANDLER)
    out = emulated.run_code(
        """
        mov eax, 1
        movd xmm0, eax
        pxor xmm1, xmm1
        mov ecx, 150
        1: int3
        loop 1b
        movd ebx, xmm1
        done
        """,
        timeout=30,
    )
    assert (out.reason, emulated.regs.rbx) == ("done", 150)


def test_handover_for_good_continues_a_loop(machine: Bare) -> None:
    machine.load("1: inc rax\n mov [rdi], rax\n jmp 1b")
    machine.regs.rdi, machine.regs.rax = DATA, 0
    assert machine.go(timeout=0.05).reason == "timeout"
    before = machine.regs.rax
    assert before > 0
    machine.hand_over()
    assert machine.go(timeout=0.05).reason == "timeout"
    assert machine.regs.rax > before
    assert abs(machine.regs.rax - int.from_bytes(machine.read(DATA, 8), "little")) <= 1
    assert machine.stats().translated_insns > 0


def test_handover_for_good_takes_timer_and_lines_along(machine: Bare) -> None:
    machine.map(IOAPIC_GPA, IOAPIC_GPA, 0x1000, P | W)
    machine.set_gate(VECTOR, HANDLER)
    machine.set_gate(VECTOR + 1, HANDLER + 0x100)
    machine.load(f"inc r15\n {EOI} iretq", HANDLER)
    machine.load(f"inc r14\n {EOI} iretq", HANDLER + 0x100)
    machine.regs.r14 = machine.regs.r15 = 0
    machine.load(
        f"""{APIC_ON}
        mov rbx, {IOAPIC_GPA}
        mov dword ptr [rbx], {0x10 + 2 * GSI_VIRTIO}
        mov dword ptr [rbx + 0x10], {VECTOR + 1}
        wrmsr_imm 0x83e, 0xb
        wrmsr_imm 0x832, {1 << 17 | VECTOR}
        wrmsr_imm 0x838, 5000000
        sti
        1: hlt
        jmp 1b
        """
    )
    assert machine.go(timeout=0.1).reason == "timeout"
    ticks = machine.regs.r15
    assert ticks > 0
    machine.hand_over()
    device = threading.Timer(0.05, machine.irq, (GSI_VIRTIO, True))
    device.start()
    assert machine.go(timeout=0.2).reason == "timeout"
    device.join()
    assert machine.regs.r15 > ticks, "the periodic timer goes on"
    assert machine.regs.r14 == 1, "the line reaches the translator's IOAPIC"


def test_handover_for_good_keeps_time_going_forward(machine: Bare) -> None:
    machine.load("rdtsc\n shl rdx, 32\n or rax, rdx\n mov rbx, rax\n done")
    assert machine.go().reason == "done"
    before = machine.regs.rbx
    machine.hand_over()
    machine.regs.rip = CODE
    assert machine.go().reason == "done"
    assert 0 < machine.regs.rbx - before < 20_000_000_000


def test_handover_of_the_translator_itself_is_refused() -> None:
    from microvm.errors import HostError

    with Bare("dbt") as machine, pytest.raises(HostError):
        machine.hand_over()
