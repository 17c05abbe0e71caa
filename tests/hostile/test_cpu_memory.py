"""Memory operands that are made to slip past the translator's checks, and translations gone stale.

The list is that of the threat model ("CPU"). Most of it must hold on every backend.
Rerun one: .venv/bin/python -m pytest tests/hostile/test_cpu_memory.py -k X
"""

from __future__ import annotations

import pytest

from microvm.testing.bare import DATA, Bare, P, W

GP, PF = 13, 14
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
