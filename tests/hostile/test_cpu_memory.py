"""Memory operands that are made to slip past the translator's checks, and translations gone stale.

The list is that of the threat model ("CPU"). Most of it must hold on every backend.
Rerun one: .venv/bin/python -m pytest tests/hostile/test_cpu_memory.py -k X
"""

from __future__ import annotations

import pytest

from microvm._native import lib
from microvm.testing import silicon
from microvm.testing.bare import (
    CODE,
    DATA,
    KERNEL_CS,
    KERNEL_DS,
    PML4,
    PS,
    USER_CS,
    USER_DS,
    Bare,
    G,
    P,
    U,
    W,
)

NM, PF = 7, 14
#: A place for mappings of our own, 4 KiB pages.
FAR = 0x4000_0000
_4G = 1 << 32


# ---- addresses that only 64 bits tell apart -------------------------------------


def test_operands_4_gib_apart_do_not_share_a_check(machine: Bare) -> None:
    # The distance between the two is -12 in 32 bits.
    machine.regs.rbx = FAR + 0x8000_0000
    machine.map(FAR, DATA, 0x1000, P | W)
    out = machine.run_code("mov eax, [rbx - 0x80000000]\n mov ecx, [rbx + 0x7ffffff0]\n done")
    assert (out.vector, out.error) == (PF, 0)
    assert machine.sregs.cr2 == FAR + _4G - 16


@pytest.mark.parametrize(
    ("moves", "by"),
    [
        ("add rbx, 0x7fffffff\n add rbx, 0x7fffffff\n add rbx, 2", _4G),
        ("lea rbx, [rbx - 0x80000000]\n lea rbx, [rbx - 0x80000000]", -_4G),
        ("sub rbx, -0x80000000\n add rbx, 0x7fffffff\n inc rbx", _4G),
        ("sub rbx, -0x80000000\n sub rbx, -0x80000000", _4G),
        ("sub rbx, -0x80000000", _4G // 2),
    ],
)
@pytest.mark.parametrize("flags", ["", "cmp al, 1"], ids=["dead", "live"])
def test_base_moved_by_gibibytes_is_another_address(
    machine: Bare, moves: str, by: int, flags: str
) -> None:
    base = 0x7_0000_0000
    machine.map(base, DATA, 0x1000, P | W)
    machine.regs.rbx = base + 8
    out = machine.run_code(f"mov eax, [rbx]\n {flags}\n {moves}\n mov ecx, [rbx]\n setc al\n done")
    assert (out.vector, out.error) == (PF, 0)
    assert machine.sregs.cr2 == base + 8 + by


@pytest.mark.parametrize("index", ["", " + rcx * 2"])
def test_pop_to_the_farthest_displacement_stores_there(machine: Bare, index: str) -> None:
    machine.map(FAR, DATA, 0x1000, P | W)
    machine.map(FAR + 0x8000_0000, DATA + 0x1000, 0x1000, P | W)
    machine.write(DATA + 0x10, b"12345678")
    machine.regs.rcx = 0
    out = machine.run_code(
        f"mov rsp, {FAR + 0x10}\n pop qword ptr [rsp + 0x7fffffff{index}]\n done"
    )
    assert out.reason == "done"
    assert machine.read(DATA + 0x1017, 8) == b"12345678"


def test_pop_through_a_segment_uses_the_stack_pointer_after_it(machine: Bare) -> None:
    machine.sregs.gs.base = 0x100
    machine.write(DATA, b"12345678")
    out = machine.run_code(f"mov rsp, {DATA}\n pop qword ptr gs:[rsp + 0x10]\n done")
    assert out.reason == "done"
    assert machine.read(DATA + 0x118, 8) == b"12345678"


# ---- translations gone stale ------------------------------------------------------

#: In the second slot of the PML4, where no other mapping is.
SLOT = 0x80_0000_0000
PML4_B = 0x60000
CR4_PGE = 1 << 7


def second_space(machine: Bare) -> None:
    """PML4_B: as the first address space, but what that has at 2 * SLOT is seen at SLOT."""
    tables = bytearray(machine.read(PML4, 0x1000))
    tables[8:16] = tables[16:24]
    machine.write(PML4_B, bytes(tables))


def test_code_behind_a_cr3_write_is_that_of_the_new_space(machine: Bare) -> None:
    for number in (1, 2):
        at = DATA + 0x1000 * number
        machine.map(number * SLOT, at, 0x1000, P | W)
        machine.load(f"mov cr3, rax\n mov ebx, {number}\n ret", at)
    second_space(machine)
    out = machine.run_code(
        f"""
        .macro via root
          mov rbp, {SLOT}
          mov eax, \\root
          call rbp
          mov eax, {PML4}
          mov cr3, rax
          shl r12, 4
          or r12, rbx
        .endm
        xor r12d, r12d
        via {PML4}
        via {PML4}
        via {PML4_B}
        via {PML4_B}
        via {PML4}
        done
        """
    )
    assert out.reason == "done"
    assert machine.regs.r12 == 0x11221


def test_instruction_behind_a_cr0_write_sees_the_new_mode(machine: Bare) -> None:
    out = machine.run_code(
        """
        mov rax, cr0
        call 1f
        call 1f
        or rax, 8
        lea rbp, [rip + 2f]
        call 1f
        ud2
        1: mov cr0, rax
        2: movaps xmm0, xmm1
        ret
        """
    )
    assert (out.vector, out.rip) == (NM, machine.regs.rbp)


def test_iret_to_what_follows_it_changes_privilege(machine: Bare) -> None:
    # A few times to ring 0, then to ring 3, from where the page behind the IRETQ is not seen.
    machine.map(FAR, DATA, 0x1000, P | W)
    out = machine.run_code(
        f"""
        mov ecx, {KERNEL_DS}
        mov edx, {KERNEL_CS}
        mov r12d, 3
        1: mov rax, rsp
        push rcx
        push rax
        push 2
        push rdx
        lea rax, [rip + 2f]
        push rax
        iretq
        2: mov al, [{FAR}]
        dec r12d
        jnz 1b
        mov ecx, {USER_DS}
        mov edx, {USER_CS}
        jmp 1b
        """
    )
    assert (out.vector, out.error, out.cs) == (PF, 5, USER_CS)
    assert machine.regs.r12 == 0


@pytest.mark.parametrize("flags", [0, G], ids=["own", "global"])
@pytest.mark.parametrize("other", [0, 0x7000], ids=["same", "other"])
def test_code_of_a_large_page_is_dropped_by_invlpg_anywhere_in_it(
    machine: Bare, flags: int, other: int
) -> None:
    machine.sregs.cr4 |= CR4_PGE
    machine.map_large(SLOT, 8 << 20, 2 << 20, P | W | flags)
    machine.load("mov ebx, 1\n ret", 8 << 20)
    machine.load("mov ebx, 2\n ret", 10 << 20)
    out = machine.run_code(
        f"""
        mov rbp, {SLOT}
        call rbp
        mov ecx, ebx
        add dword ptr [{machine.large_entry_address(SLOT)}], {2 << 20}
        invlpg [rbp + {other}]
        call rbp
        done
        """
    )
    assert out.reason == "done"
    assert (machine.regs.rcx, machine.regs.rbx) == (1, 2)


def test_large_page_split_into_small_ones_is_seen_after_invlpg(machine: Bare) -> None:
    machine.map_large(SLOT, 8 << 20, 2 << 20, P | W)
    machine.map(2 * SLOT, DATA, 2 << 20, P | W)  # a table of small pages, to be put in its place
    pde = machine.large_entry_address(SLOT)
    table = machine.large_entry_address(2 * SLOT)
    machine.write((8 << 20) + 0x5000, b"\x01")
    machine.write(DATA + 0x5000, b"\x02")
    out = machine.run_code(
        f"""
        mov rbp, {SLOT}
        mov al, [rbp + 0x5000]
        mov rcx, [{table}]
        mov [{pde}], rcx
        invlpg [rbp]
        mov ah, [rbp + 0x5000]
        done
        """
    )
    assert (out.reason, machine.regs.rax & 0xFFFF) == ("done", 0x0201)


def test_page_of_a_gibibyte_replaced_is_seen_after_invlpg(machine: Bare) -> None:
    if machine.backend == "kvm":
        pytest.skip("a KVM need not offer them")
    machine.map_large(2 * SLOT, 2 << 20, 2 << 20, P | W)
    pdpte, table = machine.huge_entry_address(SLOT), machine.huge_entry_address(2 * SLOT)
    machine.write(pdpte, (P | W | PS).to_bytes(8, "little"))  # gpa 0
    machine.write(DATA, b"\x01")
    machine.write((2 << 20) + DATA, b"\x02")
    out = machine.run_code(
        f"""
        mov rbp, {SLOT}
        mov al, [rbp + {DATA}]
        mov rcx, [{table}]
        mov [{pdpte}], rcx
        invlpg [rbp + 0x12345678]
        mov ah, [rbp + {DATA & 0x1FFFFF}]
        done
        """
    )
    assert out.reason == "done"
    assert machine.regs.rax & 0xFF == 1
    assert machine.regs.rax >> 8 & 0xFF == machine.read((2 << 20) + (DATA & 0x1FFFFF), 1)[0]


def test_global_page_is_dropped_when_pge_is_toggled(machine: Bare) -> None:
    machine.sregs.cr4 |= CR4_PGE
    machine.map(FAR, DATA, 0x1000, P | W | G)
    out = machine.run_code(
        f"""
        mov al, [{FAR}]
        mov qword ptr [{machine.pte_address(FAR)}], 0
        mov rcx, cr4
        btc rcx, 7
        mov cr4, rcx
        btc rcx, 7
        mov cr4, rcx
        mov al, [{FAR}]
        done
        """
    )
    assert (out.vector, out.error) == (PF, 0)


def test_global_page_of_code_is_dropped_when_pge_is_toggled(machine: Bare) -> None:
    machine.sregs.cr4 |= CR4_PGE
    machine.map(FAR, DATA, 0x1000, P | W | G)
    machine.load("ret", DATA)
    out = machine.run_code(
        f"""
        mov rbp, {FAR}
        call rbp
        mov qword ptr [{machine.pte_address(FAR)}], 0
        mov rcx, cr4
        btc rcx, 7
        mov cr4, rcx
        btc rcx, 7
        mov cr4, rcx
        call rbp
        done
        """
    )
    assert (out.vector, out.rip) == (PF, FAR)


def test_write_protection_switched_on_stops_the_next_write(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P)
    out = machine.run_code(
        f"""
        mov rax, cr0
        btr rax, 16
        mov cr0, rax
        mov byte ptr [{FAR}], 1
        bts rax, 16
        mov cr0, rax
        mov byte ptr [{FAR}], 2
        """
    )
    assert (out.vector, out.error) == (PF, 3)
    assert machine.read(DATA, 1) == b"\x01"


def test_page_made_supervisor_only_is_closed_to_ring_3(machine: Bare) -> None:
    if machine.backend == "kvm":
        pytest.skip("a KVM that emulates has no INT n in ring 3")
    machine.map(FAR, DATA, 0x1000, P | W | U)
    machine.set_gate(0x80, CODE + 0x8000, dpl=3)
    machine.load(
        f"and dword ptr [{machine.pte_address(FAR)}], -5\n invlpg [{FAR}]\n iretq", CODE + 0x8000
    )
    out = machine.run_code(f"mov al, [{FAR}]\n int 0x80\n mov al, [{FAR}]\n done", user=True)
    assert (out.vector, out.error, out.cs) == (PF, 5, USER_CS)


# ---- sizes --------------------------------------------------------------------------


def test_operands_of_copied_instructions_fit_where_slow_accesses_are_made() -> None:
    bounce = 128  #: struct mv_dbt.bounce
    sizes = {
        encoding.name: insn.mem_size
        for encoding, insn in silicon.all_encodings()
        if encoding.has_mem and insn.cls == lib.MV_CLASS_COPY
    }
    assert len(sizes) > 300
    assert max(sizes.values()) <= bounce
