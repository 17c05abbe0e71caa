"""Code that changes under the translator's feet, lies across pages, or is no code at all.

The list is that of the threat model ("CPU"); what tests/unit/test_vcpu_memory.py covers is not
repeated here. Rerun one: .venv/bin/python -m pytest tests/hostile/test_cpu_code.py -k X
"""

from __future__ import annotations

import pytest

from microvm.testing.bare import CODE, DATA, Bare, P, W

UD, GP, PF = 6, 13, 14
#: A place for mappings of our own, 4 KiB pages.
FAR = 0x4000_0000
MOV_EBX_42 = b"\xbb\x2a\0\0\0\xc3"  # mov ebx, 42; ret


# ---- an instruction on two pages ------------------------------------------------


@pytest.mark.parametrize(
    ("code", "vector"),
    [(b"\x66" * 15 + b"\x90", GP), (b"\x66" * 5 + b"\x0f\xff", UD), (b"\x0f\xff\xff", UD)],
    ids=["sixteen-bytes", "prefixed", "short"],
)
@pytest.mark.parametrize("before", [1, 5, 14])
def test_bad_instruction_across_pages_raises(
    machine: Bare, code: bytes, vector: int, before: int
) -> None:
    before = min(before, len(code) - 1)
    at = DATA + 0x1000 - before
    machine.map(FAR, DATA, 0x2000, P | W)
    machine.write(at, code.ljust(32, b"\x90"))
    for _ in range(2):  # translated, then found
        out = machine.run_code(f"mov rax, {FAR + 0x1000 - before}\n jmp rax")
        assert (out.vector, out.rip) == (vector, FAR + 0x1000 - before)


def test_instruction_whose_pages_are_the_same_one_runs_as_changed(machine: Bare) -> None:
    # Its last bytes lie at the start of the page that its first bytes end.
    machine.map(FAR, DATA, 0x1000, P | W)
    machine.map(FAR + 0x1000, DATA, 0x1000, P | W)
    machine.write(DATA + 0xFFE, MOV_EBX_42[:2])
    machine.write(DATA, MOV_EBX_42[2:])
    out = machine.run_code(
        f"""
        mov rbp, {FAR + 0xFFE}
        call rbp
        mov ecx, ebx
        mov byte ptr [{DATA + 2}], 1    # the highest byte of the immediate
        call rbp
        mov edx, ebx
        mov byte ptr [{DATA + 0xFFF}], 7  # the lowest
        call rbp
        done
        """
    )
    assert out.reason == "done"
    assert [machine.regs.rcx, machine.regs.rdx] == [42, 42 | 1 << 24]
    assert machine.regs.rbx == 7 | 1 << 24


def test_instruction_that_ends_in_physical_page_0_runs_as_changed(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P | W)
    machine.map(FAR + 0x1000, 0, 0x1000, P | W)
    machine.write(DATA + 0xFFE, MOV_EBX_42[:2])
    machine.write(0, MOV_EBX_42[2:])
    out = machine.run_code(
        f"""
        mov rbp, {FAR + 0xFFE}
        call rbp
        mov ecx, ebx
        mov byte ptr [{FAR + 0x1000}], 1
        call rbp
        done
        """
    )
    assert out.reason == "done"
    assert (machine.regs.rcx, machine.regs.rbx) == (42, 42 | 1 << 8)


def test_instruction_whose_second_page_is_remapped_runs_the_new_page(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P | W)
    machine.map(FAR + 0x1000, DATA + 0x1000, 0x1000, P | W)
    machine.write(DATA + 0xFFE, MOV_EBX_42)
    machine.write(DATA + 0x2000, b"\0\x01\0\xc3")
    out = machine.run_code(
        f"""
        mov rbp, {FAR + 0xFFE}
        call rbp
        mov ecx, ebx
        add dword ptr [{machine.pte_address(FAR + 0x1000)}], 0x1000
        invlpg [{FAR + 0x1000}]
        call rbp
        done
        """
    )
    assert out.reason == "done"
    assert (machine.regs.rcx, machine.regs.rbx) == (42, 42 | 1 << 16)


# ---- undefined today, defined tomorrow --------------------------------------------


def test_undefined_code_that_becomes_an_instruction_runs(machine: Bare) -> None:
    # 0f ff is undefined; 0f a2 is CPUID. The handler of #UD repairs it.
    machine.set_gate(UD, CODE + 0x8000)
    machine.load("mov rax, [rsp]\n mov byte ptr [rax + 1], 0xa2\n iretq", CODE + 0x8000)
    out = machine.run_code("xor ecx, ecx\n .byte 0x0f, 0xff\n done")
    assert out.reason == "done"


# ---- long forms -------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", [9, 10, 11])
@pytest.mark.parametrize("offset", [0, 8, 0x100])
def test_longest_instructions_run_with_any_operand(
    machine: Bare, prefixes: int, offset: int
) -> None:
    # Operand size prefixes before "mov word ptr [rbx], imm16"; other accesses share its check.
    machine.regs.rbx = DATA
    many = ", ".join(["0x66"] * prefixes)
    source = f"mov eax, [rbx - {offset}]\n .byte {many}, 0xc7, 0x03, 0x34, 0x12\n mov ecx, [rbx]"
    machine.write(DATA, bytes(8))
    out = machine.run_code(f"{source}\n done")
    assert (out.reason, machine.regs.rcx) == ("done", 0x1234)
