"""Hostile state: stacks anywhere, single steps through everything, exceptions of the vector units,
state images that lie, storms of device accesses, endless instructions.

The list is that of the threat model ("CPU"). Rerun one:
.venv/bin/python -m pytest tests/hostile/test_cpu_state.py -k X
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from microvm.testing.bare import (
    CODE,
    DATA,
    PML4,
    A,
    Bare,
    D,
    P,
    U,
    W,
)
from microvm.testing.vcpu import MMIO_GPA

DB, UD, DF, SS, GP, PF, MF, XM = 1, 6, 8, 12, 13, 14, 16, 19
#: A place for mappings of our own, 4 KiB pages.
FAR = 0x4000_0000
NON_CANONICAL = 0x8000_0000_0000_0000
TF = 1 << 8
SAVE = DATA  #: where state images lie
OSXSAVE = "mov rax, cr4\n bts rax, 18\n mov cr4, rax\n xor ecx, ecx\n mov eax, 7\n xor edx, edx\n"


@pytest.fixture
def dbt() -> Iterator[Bare]:
    """For what a KVM that emulates does not do."""
    with Bare("dbt") as machine:
        yield machine


# ---- stacks ---------------------------------------------------------------------


@pytest.mark.parametrize("rsp", [0, 7, NON_CANONICAL, 0x7FFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF])
def test_stack_pointer_anywhere_does_no_harm_while_nobody_pushes(machine: Bare, rsp: int) -> None:
    machine.load(f"mov rsp, {rsp}\n mov ecx, 100000\n 1: dec ecx\n jnz 1b\n done")
    kicker = threading.Timer(0.001, machine.kick)
    kicker.start()
    while (out := machine.go()).reason == "kicked":
        pass
    kicker.join()
    assert (out.reason, machine.regs.rsp) == ("done", rsp)


@pytest.mark.parametrize("source", ["push rax", "pop rax", "call 1f\n 1:", "ret", "leave"])
def test_stack_that_is_not_canonical_is_a_stack_fault(dbt: Bare, source: str) -> None:
    # The fault's own frame needs a stack: that of IST 1.
    dbt.write(0x3000 + 36, (0x220000).to_bytes(8, "little"))
    dbt.set_gate(SS, 0x4000 + 16 * SS, ist=1)
    out = dbt.run_code(f"mov rsp, {NON_CANONICAL}\n mov rbp, rsp\n {source}\n done")
    assert (out.vector, out.error, out.rsp) == (SS, 0, NON_CANONICAL)


def test_fault_without_a_stack_is_a_triple_fault(machine: Bare) -> None:
    assert machine.run_code(f"mov rsp, {FAR}\n ud2").reason == "shutdown"


def test_endless_recursion_over_a_stack_in_circles_can_be_kicked(dbt: Bare) -> None:
    # Every page of 1 GiB of stack is the same page; each call is to what lies before it.
    table = 0x70000
    dbt.write(table, (DATA | P | W | A | D).to_bytes(8, "little") * 512)
    dbt.write(table + 0x1000, (table | P | W | A).to_bytes(8, "little") * 512)
    dbt.write(dbt.huge_entry_address(1 << 39), (table + 0x1000 | P | W).to_bytes(8, "little"))
    dbt.load(f"mov rsp, {(1 << 39) + (1 << 30)}\n 1: call 1b")
    start = time.monotonic()
    assert dbt.go(timeout=0.1).reason in ("timeout", "shutdown")
    assert time.monotonic() - start < 3


# ---- single steps -----------------------------------------------------------------

#: What is stepped through, and how many steps it takes.
STEPPED = {
    "loads-and-stores": ("mov rax, [DATA]\n mov [DATA + 8], rax\n add [DATA], rax\n push rax", 4),
    "page-crossing": ("mov rax, [DATA + 0xffc]\n mov [DATA + 0x1ffd], rax", 2),
    "branches": ("jmp 1f\n ud2\n 1: xor ecx, ecx\n jrcxz 1f\n ud2\n 1: jc 1f\n nop\n 1: nop", 6),
    "calls": ("call 1f\n jmp 2f\n 1: ret\n 2: lea rax, [rip + 1f]\n jmp rax\n 1: nop", 6),
    "system": ("swapgs\n swapgs\n mov rax, cr0\n cpuid\n rdtsc\n cld", 6),
    "strings": ("mov edi, DATA\n mov ecx, 1\n rep stosb", 3),
    "vectors": ("movups xmm0, [DATA]\n fld1\n fstp qword ptr [DATA]", 3),
    "flags": ("cmp eax, eax\n setz al\n lahf\n stc\n adc eax, 0\n bt [DATA], eax", 6),
}


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("options", [{}, {"no_chain": 1, "max_insns": 1}], ids=["dbt", "plain"])
def test_single_step_stops_behind_every_instruction(name: str, options: dict[str, int]) -> None:
    source, steps = STEPPED[name]
    with Bare("dbt", options=options) as machine:
        machine.set_gate(DB, CODE + 0x8000)
        machine.load("inc r15\n iretq", CODE + 0x8000)
        machine.regs.r15 = 0
        out = machine.run_code(
            f".set DATA, {DATA}\n pushfq\n or dword ptr [rsp], {TF}\n popfq\n"
            f"{source}\n pushfq\n and dword ptr [rsp], {~TF}\n popfq\n done"
        )
        assert out.reason == "done"
        # POPFQ that sets TF is not stepped itself; the two before the POPFQ that clears it are,
        # and so is that one.
        assert machine.regs.r15 == steps + 3


def test_single_step_of_a_fault_stops_once(dbt: Bare) -> None:
    dbt.set_gate(DB, CODE + 0x8000)
    dbt.load("inc r15\n iretq", CODE + 0x8000)
    dbt.regs.r15 = 0
    out = dbt.run_code(f"pushfq\n or dword ptr [rsp], {TF}\n popfq\n nop\n mov al, [{FAR}]")
    assert (out.vector, out.rflags & TF, dbt.regs.r15) == (PF, TF, 1)


def test_single_step_in_ring_3_reaches_ring_0(machine: Bare) -> None:
    out = machine.run_code("nop\n nop", user=True, rflags=2 | TF)
    assert (out.vector, out.rip, out.cs & 3) == (DB, CODE + 1, 3)


# ---- privilege --------------------------------------------------------------------


def test_ring_3_cannot_run_a_page_of_ring_0(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P | W)
    machine.load("ret", DATA)
    # Ring 0 first, so that a translation is there.
    assert machine.run_code(f"mov rax, {FAR}\n call rax\n done").reason == "done"
    out = machine.run_code(f"mov rax, {FAR}\n jmp rax", user=True)
    assert (out.vector, out.rip, out.cs & 3) == (PF, FAR, 3)
    assert out.error & 7 == 5


def test_ring_0_runs_a_page_of_ring_3_with_its_own_rights(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P | W | U)
    machine.map(FAR + 0x1000, DATA + 0x1000, 0x1000, P | W)
    machine.load(f"mov al, [{FAR + 0x1000}]\n ret", DATA)
    out = machine.run_code(f"mov rax, {FAR}\n call rax", user=True)
    assert (out.vector, out.error) == (PF, 5)
    assert machine.run_code(f"mov rax, {FAR}\n call rax\n done").reason == "done"
    out = machine.run_code(f"mov rax, {FAR}\n call rax", user=True)
    assert (out.vector, out.error) == (PF, 5)


@pytest.mark.parametrize(
    "source",
    ["hlt", "cli", "mov rax, cr3", "mov cr3, rax", "wbinvd", "rdmsr", "lgdt [rbx]", "invlpg [rbx]"],
)
def test_ring_3_cannot_do_what_ring_0_does(machine: Bare, source: str) -> None:
    out = machine.run_code(f"mov ebx, {DATA}\n {source}", user=True)
    assert (out.vector, out.error) == (GP, 0)


# ---- exceptions of the vector units -------------------------------------------------


def test_unmasked_sse_exception_is_xm(dbt: Bare) -> None:
    out = dbt.run_code(
        "push 0\n ldmxcsr [rsp]\n xorps xmm0, xmm0\n divss xmm0, xmm0\n mov eax, 1\n done"
    )
    assert out.vector == XM


def test_unmasked_x87_exception_is_mf_at_the_next_instruction(dbt: Bare) -> None:
    out = dbt.run_code(
        "fninit\n push 0\n fldcw [rsp]\n fldz\n fldz\n fdivp\n mov ebx, 42\n fld1\n done"
    )
    assert (out.vector, dbt.regs.rbx) == (MF, 42)


def test_mxcsr_with_reserved_bits_is_gp(dbt: Bare) -> None:
    out = dbt.run_code("push 0x10000\n ldmxcsr [rsp]\n done")
    assert (out.vector, out.error) == (GP, 0)


@pytest.mark.parametrize("address", [DATA + 8, FAR + 8], ids=["present", "absent"])
def test_misaligned_vector_operand_is_gp(machine: Bare, address: int) -> None:
    out = machine.run_code(f"mov rbx, {address}\n movaps xmm0, [rbx]\n done")
    assert (out.vector, out.error) == (GP, 0)


# ---- state images that lie ------------------------------------------------------------


def fxsave_image(mxcsr: int = 0x1F80) -> bytes:
    image = bytearray(512)
    image[0:2] = (0x37F).to_bytes(2, "little")
    image[24:28] = mxcsr.to_bytes(4, "little")
    return bytes(image)


def xsave_image(bv: int = 7, comp: int = 0, *, mxcsr: int = 0x1F80, reserved: int = 0) -> bytes:
    header = b"".join(v.to_bytes(8, "little") for v in (bv, comp, reserved)) + bytes(40)
    return fxsave_image(mxcsr) + header + bytes(256)


def test_fxrstor_with_reserved_mxcsr_bits_is_gp(dbt: Bare) -> None:
    dbt.write(SAVE, fxsave_image(0x10000))
    out = dbt.run_code(f"fxrstor64 [{SAVE}]\n done")
    assert (out.vector, out.error) == (GP, 0)


@pytest.mark.parametrize(
    "image",
    [
        xsave_image(bv=1 << 9),
        xsave_image(bv=0xE7),
        xsave_image(bv=1 << 63),
        xsave_image(comp=1),
        xsave_image(reserved=1),
        xsave_image(comp=1 << 63),
        xsave_image(comp=1 << 63 | 0xFFFF),
        xsave_image(bv=7, comp=1 << 63 | 3),
        xsave_image(bv=3, comp=1 << 63 | 7, reserved=1 << 32),
        xsave_image(mxcsr=0xFFFF_FFFF),
        xsave_image(comp=1 << 63 | 7, mxcsr=0xFFFF_FFFF),
    ],
    ids=range(11),
)
def test_xrstor_of_a_hostile_header_is_gp(dbt: Bare, image: bytes) -> None:
    dbt.write(SAVE, image)
    out = dbt.run_code(f"{OSXSAVE} xsetbv\n mov eax, -1\n mov edx, -1\n xrstor64 [{SAVE}]\n done")
    assert (out.vector, out.error) == (GP, 0)


@pytest.mark.parametrize("op", ["xsave64", "xsaveopt64", "xsavec64", "xrstor64", "fxsave64"])
def test_state_image_out_of_place_faults(dbt: Bare, op: str) -> None:
    source = f"{OSXSAVE} xsetbv\n mov eax, -1\n mov edx, -1\n {op}"
    assert dbt.run_code(f"{source} [{SAVE + 8}]\n done").vector == GP
    dbt.map(FAR, DATA, 0x1000, P | W)
    out = dbt.run_code(f"{source} [{FAR + 0x1000 - 64}]\n done")
    assert (out.vector, dbt.sregs.cr2) == (PF, FAR + 0x1000)


def test_state_image_in_mmio_does_no_harm(dbt: Bare) -> None:
    dbt.map(FAR, MMIO_GPA, 0x2000, P | W)
    out = dbt.run_code(
        f"{OSXSAVE} xsetbv\n mov eax, 7\n xsave64 [{FAR}]\n fxsave64 [{FAR + 0xFF0}]\n"
        f"xrstor64 [{FAR}]\n done"
    )
    assert (out.vector, out.error) == (GP, 0)  # the device reads as nonsense


def test_xsetbv_of_what_is_not_offered_is_gp(dbt: Bare) -> None:
    for value in (0, 2, 5, 1 << 9 | 7, 0x27):
        out = dbt.run_code(f"{OSXSAVE} mov eax, {value}\n xsetbv\n done")
        assert (out.vector, out.error) == (GP, 0)


# ---- storms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "mov dx, 0x510\n 1: in eax, dx\n out dx, al\n loop 1b",
        f"mov rbx, {FAR}\n 1: mov eax, [rbx]\n lock add [rbx + 4], rax\n loop 1b",
        f"mov rbx, {FAR + 0xFFD}\n 1: mov [rbx], rax\n mov rdx, [rbx]\n loop 1b",
        f"mov rbx, {FAR}\n 1: movups xmm0, [rbx + 1]\n fld tbyte ptr [rbx]\n fstp st\n loop 1b",
        f"mov edi, {DATA}\n mov rsi, {FAR}\n rep movsq",
    ],
    ids=["ports", "rmw", "crossing", "wide", "string"],
)
def test_storm_of_device_accesses_ends(dbt: Bare, source: str) -> None:
    dbt.map(FAR, MMIO_GPA, 0x40000, P | W)
    assert dbt.run_code(f"mov ecx, 20000\n {source}\n done", timeout=20).reason == "done"


def test_time_stamp_counter_never_goes_back(machine: Bare) -> None:
    out = machine.run_code(
        """
        xor ebx, ebx
        mov esi, 3000
        1: rdtsc
        shl rdx, 32
        or rax, rdx
        cmp rax, rbx
        jb 2f
        mov rbx, rax
        test esi, 63
        jnz 3f
        in al, 0x80
        3: dec esi
        jnz 1b
        done
        2: ud2
        """
    )
    assert out.reason == "done"


@pytest.mark.parametrize(
    "source",
    [
        f"mov edi, {DATA}\n mov rcx, -1\n std\n rep stosb",
        f"1: mov rdi, {FAR}\n mov ecx, 0x3ffff\n rep stosd\n jmp 1b",
        f"mov esi, {DATA}\n mov rcx, -1\n rep lodsb",
        "mov dx, 0x510\n 1: mov rcx, -1\n mov edi, 0x300000\n rep insb\n jmp 1b",
    ],
    ids=["backwards", "mmio", "loads", "port"],
)
def test_endless_string_instruction_can_be_kicked(dbt: Bare, source: str) -> None:
    dbt.map(FAR, MMIO_GPA, 0x100000, P | W)
    dbt.load(source)
    start = time.monotonic()
    assert dbt.go(timeout=0.02).reason in ("timeout", "done")
    assert time.monotonic() - start < 5


# ---- what devices and page tables do ---------------------------------------------------


def test_code_that_a_device_rewrites_while_it_runs_is_seen(dbt: Bare) -> None:
    # Another thread changes the immediate; the loop ends when it has seen the new value.
    dbt.load("1: mov eax, 7\n cmp eax, 42\n jne 1b\n done", DATA)
    dbt.load(f"mov rax, {DATA}\n jmp rax")

    def rewrite() -> None:
        time.sleep(0.02)
        dbt.write(DATA + 1, b"\x2a")

    writer = threading.Thread(target=rewrite)
    writer.start()
    out = dbt.go(timeout=10)
    writer.join()
    assert (out.reason, dbt.regs.rax) == ("done", 42)


def test_page_of_code_that_is_also_data_keeps_both_right(machine: Bare) -> None:
    # A counter next to the code that counts: each store is to a page that holds translations.
    out = machine.run_code(
        """
        mov ecx, 2000
        1: inc dword ptr [rip + 2f]
        mov eax, [rip + 2f]
        add edx, eax
        loop 1b
        done
        .balign 4
        2: .long 0
        """
    )
    assert out.reason == "done"
    assert machine.regs.rdx & 0xFFFFFFFF == sum(range(2001)) & 0xFFFFFFFF


def test_page_tables_that_hold_themselves_and_code_do_no_harm(dbt: Bare) -> None:
    # The PML4 is mapped, executed (as what its bytes say), and written, all at once.
    dbt.map(FAR, PML4, 0x1000, P | W)
    out = dbt.run_code(f"mov rax, {FAR + 8}\n mov qword ptr [rax], 0x90c3\n call rax\n done")
    assert out.reason in ("done", "exception")


def test_stack_top_in_the_mirror_of_a_page_table_does_no_harm(dbt: Bare) -> None:
    # Pushes rewrite the page table entry that maps the stack itself.
    table = dbt.pte_address(FAR) & ~0xFFF
    dbt.map(FAR, table, 0x1000, P | W)
    out = dbt.run_code(f"mov rsp, {FAR + 0x10}\n push 0\n push 0\n invlpg [{FAR}]\n push 1")
    assert out.reason in ("shutdown", "exception")
