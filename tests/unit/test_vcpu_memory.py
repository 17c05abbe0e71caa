"""Code and memory on both backends: self-modifying code, page tables, the TLB, aliases, I/O.

The list is that of the threat model ("CPU"). Each payload is a few instructions in a bare 64-bit
machine; `out.vector` is the exception that ended it.
"""

from __future__ import annotations

import threading
import time

import pytest

from microvm.testing.bare import (
    CODE,
    DATA,
    NX,
    PML4,
    A,
    Bare,
    D,
    G,
    P,
    U,
    W,
)
from microvm.testing.vcpu import MMIO_GPA, Access

UD, GP, PF = 6, 13, 14
#: A place for mappings of our own, 4 KiB pages.
FAR = 0x4000_0000


# ---- code that changes -------------------------------------------------------


def test_code_changed_ahead_in_the_same_block_runs_as_changed(machine: Bare) -> None:
    out = machine.run_code(
        """
        xor eax, eax
        mov byte ptr [rip + 1f + 1], 42   # the immediate of the next mov
        1: mov ebx, 7
        done
        """
    )
    assert out.reason == "done"
    assert machine.regs.rbx == 42


def test_code_changed_by_itself_in_a_loop_runs_as_changed(machine: Bare) -> None:
    out = machine.run_code(
        """
        xor eax, eax
        mov ecx, 10
        1: add eax, 1                     # 83 c0 01: the immediate grows
        inc byte ptr [rip + 1b + 2]
        dec ecx
        jnz 1b
        done
        """
    )
    assert out.reason == "done"
    assert machine.regs.rax == sum(range(1, 11))


def test_code_changed_through_an_alias_runs_as_changed(machine: Bare) -> None:
    machine.map(FAR, CODE, 0x1000, P | W)
    out = machine.run_code(
        f"""
        mov ecx, 3
        1: call 2f
        inc byte ptr [{FAR} + 2f - {CODE} + 1]
        dec ecx
        jnz 1b
        done
        2: mov ebx, 7
        ret
        """
    )
    assert out.reason == "done"
    assert machine.regs.rbx == 9


def test_code_changed_by_string_store_runs_as_changed(machine: Bare) -> None:
    out = machine.run_code(
        """
        mov edx, 2
        1: call 2f
        lea rdi, [rip + 2f]
        mov al, 0x90
        mov ecx, 5
        rep stosb                          # nop over the mov
        dec edx
        jnz 1b
        done
        2: mov ebx, 7
        inc ebx
        ret
        """
    )
    assert out.reason == "done"
    assert machine.regs.rbx == 9


def test_code_changed_on_the_next_page_runs_as_changed(machine: Bare) -> None:
    # The instruction lies across two pages; its immediate, on the second, is changed.
    at = CODE + 0x1000 - 2
    machine.load("mov ebx, 7\n ret", at)
    out = machine.run_code(
        f"""
        call {at}
        mov byte ptr [{CODE} + 0x1000], 42
        call {at}
        done
        """
    )
    assert out.reason == "done"
    assert machine.regs.rbx & 0xFF00 == 42 << 8


def test_code_changed_by_a_device_runs_as_changed(machine: Bare) -> None:
    machine.load("mov ebx, 7\n ret", DATA)
    source = f"mov rax, {DATA}\n call rax\n done"
    assert machine.run_code(source).reason == "done"
    machine.write(DATA + 1, b"\x2a")
    assert machine.run_code(source).reason == "done"
    assert machine.regs.rbx == 42


def test_code_remapped_to_another_page_runs_the_new_page(machine: Bare) -> None:
    machine.load("mov ebx, 1\n ret", DATA)
    machine.load("mov ebx, 2\n ret", DATA + 0x1000)
    machine.map(FAR, DATA, 0x1000, P | W)
    pte = machine.pte_address(FAR)
    out = machine.run_code(
        f"""
        mov rax, {FAR}
        call rax
        mov ecx, ebx
        add dword ptr [{pte}], 0x1000
        invlpg [rax]
        call rax
        done
        """
    )
    assert out.reason == "done"
    assert (machine.regs.rcx, machine.regs.rbx) == (1, 2)


def test_code_entered_in_the_middle_of_an_instruction_runs_what_the_bytes_say(
    machine: Bare,
) -> None:
    # b8 b3 2a 90 90: mov eax, 0x90902ab3; from its second byte: mov bl, 42; nop; nop
    out = machine.run_code(
        """
        xor ebx, ebx
        lea rcx, [rip + 1f]
        1: .byte 0xb8, 0xb3, 0x2a, 0x90, 0x90
        test ebx, ebx
        jnz 2f
        inc rcx
        jmp rcx
        2: done
        """
    )
    assert out.reason == "done"
    assert machine.regs.rbx == 42
    assert machine.regs.rax == 0x90902AB3


def test_instruction_of_fifteen_bytes_runs(machine: Bare) -> None:
    # 66 prefixes before add word ptr [rbx], imm16
    machine.write(DATA, bytes(2))
    prefixes = ", ".join(["0x66"] * 10)
    out = machine.run_code(
        f"mov ebx, {DATA}\n .byte {prefixes}, 0x81, 0x03, 0x34, 0x12, 0x90\n done"
    )
    assert out.reason == "done"
    assert machine.read(DATA, 2) == b"\x34\x12"


def test_instruction_of_sixteen_bytes_is_gp(machine: Bare) -> None:
    prefixes = ", ".join(["0x66"] * 12)
    out = machine.run_code(f"mov ebx, {DATA}\n .byte {prefixes}, 0x81, 0x03, 0x34, 0x12\n done")
    assert (out.vector, out.error) == (GP, 0)


def test_instruction_whose_second_page_is_absent_faults_there(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P | W)
    machine.map(FAR + 0x1000, 0, 0x1000, 0)
    machine.load("mov ebx, 7", DATA + 0x1000 - 2)
    out = machine.run_code(f"mov rax, {FAR + 0x1000 - 2}\n jmp rax")
    assert (out.vector, out.rip) == (PF, FAR + 0x1000 - 2)
    assert machine.sregs.cr2 == FAR + 0x1000


def test_instruction_that_ends_with_its_page_runs_before_the_fault(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P | W)
    machine.load("mov ebx, 7", DATA + 0x1000 - 5)
    out = machine.run_code(f"mov rax, {FAR + 0x1000 - 5}\n jmp rax")
    assert (out.vector, out.rip) == (PF, FAR + 0x1000)
    assert machine.regs.rbx == 7


def test_code_on_a_no_execute_page_faults_with_fetch_bit(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P | W | NX)
    out = machine.run_code(f"mov rax, {FAR}\n jmp rax")
    assert (out.vector, out.error, out.rip) == (PF, 0x11, FAR)


def test_code_made_no_execute_after_it_ran_faults(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P | W)
    machine.load("ret", DATA)
    pte = machine.pte_address(FAR)
    out = machine.run_code(
        f"""
        mov rax, {FAR}
        call rax
        bts qword ptr [{pte}], 63
        invlpg [rax]
        call rax
        done
        """
    )
    assert (out.vector, out.error, out.rip) == (PF, 0x11, FAR)


# ---- page tables -------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "source", "user", "error"),
    [
        (0, "mov al, [rbx]", False, 0),
        (0, "mov [rbx], al", False, 2),
        (0, "mov al, [rbx]", True, 4),
        (P, "mov [rbx], al", False, 3),
        (P | W, "mov al, [rbx]", True, 5),
        (P | U, "mov [rbx], al", True, 7),
        (P | U, "add [rbx], al", True, 7),
        (P | U, "push [rbx]; pop [rbx]", True, 7),
    ],
)
def test_page_fault_tells_what_was_wrong(
    machine: Bare, flags: int, source: str, user: bool, error: int
) -> None:
    machine.map(FAR, DATA, 0x1000, flags | NX * bool(flags))
    machine.regs.rbx = FAR + 0x123
    out = machine.run_code(source, user=user)
    assert (out.vector, out.error) == (PF, error)
    assert machine.sregs.cr2 == FAR + 0x123


def test_page_fault_in_a_store_across_pages_changes_nothing(machine: Bare) -> None:
    if machine.backend == "kvm":
        pytest.skip("a KVM that emulates stores the first page's part")
    machine.map(FAR, DATA, 0x1000, P | W)
    machine.map(FAR + 0x1000, DATA, 0x1000, P)
    machine.write(DATA + 0xFF8, b"unharmed")
    out = machine.run_code(f"mov rbx, {FAR + 0xFFC}\n mov rax, -1\n mov [rbx], rax")
    assert (out.vector, out.error) == (PF, 3)
    assert machine.sregs.cr2 == FAR + 0x1000
    assert machine.read(DATA + 0xFF8, 8) == b"unharmed"


def test_write_protect_off_lets_ring_0_write_read_only_pages(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P)
    out = machine.run_code(
        f"mov rax, cr0\n btr rax, 16\n mov cr0, rax\n mov byte ptr [{FAR}], 42\n done"
    )
    assert out.reason == "done"
    assert machine.read(DATA, 1) == b"*"


def test_accessed_and_dirty_bits_are_set_when_used(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x2000, P | W)
    out = machine.run_code(f"mov al, [{FAR}]\n mov [{FAR + 0x1000}], al\n done")
    assert out.reason == "done"
    read, written = (
        int.from_bytes(machine.read(machine.pte_address(FAR + at), 8), "little")
        for at in (0, 0x1000)
    )
    assert read & (A | D) == A
    assert written & (A | D) == A | D


def test_non_canonical_address_is_gp(machine: Bare) -> None:
    out = machine.run_code("mov rbx, 0x800000000000\n mov al, [rbx]")
    assert (out.vector, out.error) == (GP, 0)


def test_reserved_bit_in_a_page_table_entry_faults_with_that_bit(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P | W)
    at = machine.pte_address(FAR)
    entry = int.from_bytes(machine.read(at, 8), "little") | 1 << 51
    machine.write(at, entry.to_bytes(8, "little"))
    out = machine.run_code(f"mov al, [{FAR}]")
    assert (out.vector, out.error) == (PF, 9)


def test_stale_translation_is_dropped_by_invlpg(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P | W)
    machine.write(DATA, b"\x01")
    machine.write(DATA + 0x1000, b"\x02")
    pte = machine.pte_address(FAR)
    out = machine.run_code(
        f"""
        mov al, [{FAR}]
        add dword ptr [{pte}], 0x1000
        invlpg [{FAR}]
        mov ah, [{FAR}]
        done
        """
    )
    assert out.reason == "done"
    assert machine.regs.rax & 0xFFFF == 0x0201


@pytest.mark.parametrize("flags", [0, G], ids=["own", "global"])
def test_stale_translation_is_dropped_by_cr3(machine: Bare, flags: int) -> None:
    machine.map(FAR, DATA, 0x1000, P | W | flags)
    pte = machine.pte_address(FAR)
    out = machine.run_code(
        f"""
        mov al, [{FAR}]
        mov qword ptr [{pte}], 0
        mov rcx, cr3
        mov cr3, rcx
        mov al, [{FAR}]
        done
        """
    )
    # CR4.PGE is off: "global" means nothing.
    assert (out.vector, out.error) == (PF, 0)


def test_page_made_read_only_after_a_write_faults(machine: Bare) -> None:
    machine.map(FAR, DATA, 0x1000, P | W)
    pte = machine.pte_address(FAR)
    out = machine.run_code(
        f"""
        mov byte ptr [{FAR}], 1
        and dword ptr [{pte}], -3
        invlpg [{FAR}]
        mov byte ptr [{FAR}], 2
        """
    )
    assert (out.vector, out.error) == (PF, 3)
    assert machine.read(DATA, 1) == b"\x01"


def test_page_table_entry_beyond_ram_reads_nothing_of_the_host(machine: Bare) -> None:
    machine.map(FAR, 0x100_0000_0000 - 0x1000, 0x1000, P | W)
    out = machine.run_code(f"mov rax, [{FAR}]\n mov [{FAR}], rax\n done")
    assert out.reason == "done"
    assert machine.regs.rax == 0xFFFF_FFFF_FFFF_FFFF


@pytest.mark.parametrize("table", [0x100_0000_0000 - 0x1000, MMIO_GPA], ids=["past-ram", "mmio"])
def test_page_table_outside_ram_ends_in_an_orderly_way(backend: str, table: int) -> None:
    with Bare(backend) as machine:
        slot = PML4 + 8 * 511
        machine.write(slot, (table | P | W | U).to_bytes(8, "little"))
        out = machine.run_code("mov rax, [-0x1000]\n done", timeout=2)
        # What such a table holds is undefined; the vCPU must live and say something.
        assert out.reason in ("exception", "done", "emulate", "error")


def test_page_table_that_points_at_itself_reads_itself(machine: Bare) -> None:
    slot = PML4 + 8 * 300
    machine.write(slot, (PML4 | P | W | U).to_bytes(8, "little"))
    gva = 0xFFFF << 48 | 300 << 39 | 300 << 30 | 300 << 21 | 300 << 12
    out = machine.run_code(f"mov rbx, {gva}\n mov rax, [rbx + 8 * 300]\n done")
    assert out.reason == "done"
    assert machine.regs.rax & ~(A | D) == PML4 | P | W | U


# ---- ports and MMIO ------------------------------------------------------------


def test_port_accesses_reach_the_device_in_order(machine: Bare) -> None:
    out = machine.run_code(
        """
        mov dx, 0x510
        in al, dx
        mov bl, al
        in eax, dx
        mov ecx, eax
        mov ax, 0xbeef
        out dx, ax
        mov eax, 0x12345678
        out 0x80, eax
        done
        """
    )
    assert out.reason == "done"
    assert machine.log() == [
        Access("port", "read", 0x510, 1, 0x10),
        Access("port", "read", 0x510, 4, 0x13121110),
        Access("port", "write", 0x510, 2, 0xBEEF),
        Access("port", "write", 0x80, 4, 0x12345678),
    ]
    assert (machine.regs.rbx & 0xFF, machine.regs.rcx) == (0x10, 0x13121110)


def test_port_string_output_writes_each_element(machine: Bare) -> None:
    machine.write(DATA, b"abc")
    out = machine.run_code(f"mov esi, {DATA}\n mov ecx, 3\n mov dx, 0x3f8\n rep outsb\n done")
    assert out.reason == "done"
    assert [access.value for access in machine.log()] == list(b"abc")
    assert (machine.regs.rsi, machine.regs.rcx) == (DATA + 3, 0)


def test_port_string_input_stores_each_element(machine: Bare) -> None:
    out = machine.run_code(f"mov edi, {DATA}\n mov ecx, 2\n mov dx, 0x520\n rep insw\n done")
    assert out.reason == "done"
    assert machine.read(DATA, 4) == b"\x20\x21\x20\x21"
    assert (machine.regs.rdi, machine.regs.rcx) == (DATA + 4, 0)


def test_port_access_in_user_mode_is_gp(machine: Bare) -> None:
    out = machine.run_code("mov dx, 0x510\n in al, dx", user=True)
    assert (out.vector, out.error) == (GP, 0)
    assert machine.log() == []


@pytest.fixture
def mmio(machine: Bare) -> Bare:
    machine.map(FAR, MMIO_GPA, 0x2000, P | W)
    machine.regs.rbx = FAR
    return machine


@pytest.mark.parametrize(
    ("source", "size", "value"),
    [
        ("mov [rbx], al", 1, 0x88),
        ("mov [rbx], ax", 2, 0x7788),
        ("mov [rbx], eax", 4, 0x55667788),
        ("mov [rbx], rax", 8, 0x1122334455667788),
        ("mov dword ptr [rbx], 0x1234", 4, 0x1234),
    ],
)
def test_mmio_write_is_one_access(mmio: Bare, source: str, size: int, value: int) -> None:
    out = mmio.run_code(f"mov rax, 0x1122334455667788\n {source}\n done")
    assert out.reason == "done"
    assert mmio.log() == [Access("mmio", "write", MMIO_GPA, size, value)]


def test_mmio_read_is_one_access(mmio: Bare) -> None:
    out = mmio.run_code("mov eax, [rbx + 4]\n movzx ecx, byte ptr [rbx + 9]\n done")
    assert out.reason == "done"
    assert (mmio.regs.rax, mmio.regs.rcx) == (0x07060504, 9)
    assert [(a.addr - MMIO_GPA, a.len, a.kind) for a in mmio.log()] == [
        (4, 4, "read"),
        (9, 1, "read"),
    ]


def test_mmio_read_modify_write_reads_then_writes(mmio: Bare) -> None:
    out = mmio.run_code("add dword ptr [rbx], 1\n done")
    assert out.reason == "done"
    assert mmio.log() == [
        Access("mmio", "read", MMIO_GPA, 4, 0x03020100),
        Access("mmio", "write", MMIO_GPA, 4, 0x03020101),
    ]


def test_mmio_string_copy_reads_each_element(mmio: Bare) -> None:
    out = mmio.run_code(f"mov rsi, rbx\n mov edi, {DATA}\n mov ecx, 4\n rep movsd\n done")
    assert out.reason == "done"
    assert mmio.read(DATA, 16) == bytes(range(16))
    assert [access.kind for access in mmio.log()] == ["read"] * 4


def test_mmio_then_fault_is_precise(mmio: Bare) -> None:
    out = mmio.run_code("mov ecx, 1\n mov eax, [rbx]\n mov ecx, 2\n ud2\n mov ecx, 3")
    assert out.vector == UD
    assert mmio.regs.rcx == 2


# ---- endless and huge ------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "jmp .",
        "1: call 2f\n 2: pop rax\n jmp 1b",
        "1: mov rcx, -1\n rep lodsb\n jmp 1b",
        "1: hlt\n jmp 1b",
    ],
    ids=["jump", "call", "rep", "halt"],
)
def test_kick_ends_any_loop_soon(machine: Bare, source: str) -> None:
    machine.load(source)
    took: list[float] = []

    def kick() -> None:
        time.sleep(0.05)
        took.append(time.monotonic())
        machine.kick()

    kicker = threading.Thread(target=kick)
    kicker.start()
    machine.regs.rsi = DATA
    out = machine.go(timeout=10)
    kicker.join()
    assert out.reason == "kicked"
    assert time.monotonic() - took[0] < 1


def test_kick_before_the_run_ends_it_at_once(machine: Bare) -> None:
    machine.load("jmp .")
    machine.kick()
    assert machine.go(timeout=10).reason == "kicked"


def test_timeout_ends_the_run(machine: Bare) -> None:
    machine.load("jmp .")
    assert machine.go(timeout=0.05).reason == "timeout"


def test_triple_fault_is_a_shutdown(machine: Bare) -> None:
    machine.sregs.idt.limit = 0
    assert machine.run_code("ud2").reason == "shutdown"


def test_more_code_than_the_cache_holds_runs(backend: str) -> None:
    if backend != "dbt":
        pytest.skip("only the translator has a code cache")
    with Bare(backend, options={"cache_bytes": 1 << 20}, ram=32 << 20) as machine:
        # 64 KiB of different code, run five times over.
        blocks = 4096
        body = "".join(f"add eax, {i}\n jmp 1f\n .balign 16\n 1:\n" for i in range(blocks))
        machine.map_large(16 << 20, 16 << 20, 16 << 20, P | W)
        machine.load(f"1: mov ecx, ecx\n {body} ret", 16 << 20)
        out = machine.run_code(
            f"""
            xor eax, eax
            mov ebp, 5
            1: mov rbx, {16 << 20}
            call rbx
            dec ebp
            jnz 1b
            done
            """
        )
        assert out.reason == "done"
        assert machine.regs.rax == 5 * sum(range(blocks)) & 0xFFFFFFFF


def test_run_interrupted_again_and_again_loses_nothing(machine: Bare) -> None:
    machine.load("xor eax, eax\n mov ecx, 20000\n 1: inc eax\n loop 1b\n done")
    stop = threading.Event()

    def kick() -> None:
        while not stop.wait(0.0005):
            machine.kick()

    kicker = threading.Thread(target=kick)
    kicker.start()
    try:
        while machine.go(timeout=10).reason == "kicked":
            pass
    finally:
        stop.set()
        kicker.join()
    assert (machine.regs.rax, machine.regs.rcx) == (20000, 0)
