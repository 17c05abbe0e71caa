"""Random blocks of user-level code on the translator, against the host's silicon.

Whole states are compared: registers, flags, vectors, memory, and how each program ended. Two
things may differ. At a fault: arithmetic flags that the program's later code would overwrite
unread; the translator does not keep them, unless it is told that flags are always live. And an
indirect jump to an address that is not canonical faults at that address, not at the jump.

A failure prints its seed and the shortest program that still differs:
    MICROVM_SEED=SEED .venv/bin/python -m pytest tests/fuzz/test_blocks.py
More rounds: MICROVM_FUZZ_SECONDS=600 (`make fuzz`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace

import blocks
import pytest

from microvm.testing import silicon
from microvm.testing.bare import P, W

XCR0 = 7  #: x87, SSE, AVX
SEED = os.environ.get("MICROVM_SEED", "1")
PROGRAMS = 150  #: a round
GP, PF = 13, 14
FROM_IDT = 2  #: in an error code

#: Switches that must change nothing but speed.
OPTIONS: dict[str, dict[str, int]] = {
    "default": {},
    "no-chain": {"no_chain": 1},
    "no-tlb": {"no_tlb": 1},
    "no-coalesce": {"no_coalesce": 1},
    "flags-always-live": {"no_flags_live": 1},
    "one-instruction-blocks": {"max_insns": 1},
    "tiny-cache": {"cache_bytes": 256 << 10},
    "slowest": {"no_chain": 1, "no_tlb": 1, "no_flags_live": 1, "max_insns": 2},
}


def rounds() -> Iterator[str]:
    """Seeds: one, and more while there is time."""
    until = time.monotonic() + float(os.environ.get("MICROVM_FUZZ_SECONDS", "0")) / len(OPTIONS)
    yield SEED
    number = 0
    while time.monotonic() < until:
        number += 1
        yield f"{SEED}.{number}"


def new_guest(options: dict[str, int]) -> silicon.SiliconGuest:
    guest = silicon.SiliconGuest("dbt", xcr0=XCR0, options=options)
    guest.map_large(0, 0, 16 << 20, P | W)  # what the silicon does not see, ring 3 does not
    return guest


def is_canonical(address: int) -> bool:
    return address >> 47 in (0, (1 << 17) - 1)


def is_the_hosts(address: int) -> bool:
    """Is there memory of this process, such as the heap of a Python at a fixed address?"""
    if blocks.in_sandbox(address):
        return False
    with open("/proc/self/maps", encoding="utf-8") as maps:
        ranges = (line.split()[0].split("-") for line in maps)
        return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def differing(
    guest: silicon.SiliconGuest, programs: list[blocks.Program], *, exact: bool
) -> list[tuple[blocks.Program, list[str]]]:
    """Programs that do not end on the guest as on the silicon, with what differs."""
    if not programs:
        return []
    cases = [
        blocks.make_case(program, code, XCR0)
        for program, code in zip(programs, blocks.assemble(programs), strict=True)
    ]
    wrong = []
    native = silicon.run_natively(cases)
    for i in range(len(cases)):
        if not native[i].ran:  # an endless loop: it and what comes after it was not run
            before, behind = programs[:i], programs[i + 1 :]
            return differing(guest, before, exact=exact) + differing(guest, behind, exact=exact)
    ours = guest.run_cases(cases)
    for i, (program, case) in enumerate(zip(programs, cases, strict=True)):
        if ours[i].vector == native[i].vector == GP and not is_canonical(ours[i].out.rip):
            continue
        if native[i].vector == GP and native[i].error & FROM_IDT:
            continue  # it jumped into an instruction, and that was an INT n: gates differ
        if ours[i].vector == PF and is_the_hosts(ours[i].cr2):
            continue  # silicon found something there
        if not blocks.in_sandbox(native[i].cr2):  # present in another way
            native[i].error |= 1
            ours[i].error |= 1
        found = silicon.differences(case, native[i], ours[i], exact_flags=exact)
        if found:
            wrong.append((program, found))
    return wrong


def places(found: list[str]) -> set[str]:
    """Where a difference is seen: names of registers, areas of memory."""
    return {text.partition(":")[0].partition("+")[0] for text in found}


def shortest(
    program: blocks.Program, where: set[str], options: dict[str, int], *, exact: bool
) -> blocks.Program:
    """What is left of a program when every line is out that the difference does not need."""
    step = max(len(program.lines) // 2, 1)
    while True:
        at = 0
        while at < len(program.lines):
            fewer = replace(program, lines=program.lines[:at] + program.lines[at + step :])
            try:
                with new_guest(options) as guest:
                    again = differing(guest, [fewer], exact=exact)
                    still = bool(again) and places(again[0][1]) == where
            except AssertionError:  # a label is missing
                still = False
            if still:
                program = fewer
            else:
                at += step
        if step == 1:
            return program
        step //= 2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_blocks_do_what_silicon_does(options: dict[str, int]) -> None:
    exact = "no_flags_live" in options
    with new_guest(options) as guest:
        for seed in rounds():
            programs = [blocks.write_program(f"{seed}/{i}") for i in range(PROGRAMS)]
            wrong = differing(guest, programs, exact=exact)
            if not wrong:
                continue
            program, found = wrong[0]
            report = f"{len(wrong)} programs differ, round {seed}\n{'; '.join(found)}\n"
            pytest.fail(f"{report}{shortest(program, places(found), options, exact=exact)}")


def test_blocks_mostly_run_to_their_end() -> None:
    programs = [blocks.write_program(f"{SEED}/{i}") for i in range(PROGRAMS)]
    cases = [
        blocks.make_case(program, code, XCR0)
        for program, code in zip(programs, blocks.assemble(programs), strict=True)
    ]
    breakpoint_ = 3
    ends = [result.vector for result in silicon.run_natively(cases)]
    assert ends.count(breakpoint_) > PROGRAMS // 3
    assert len(set(ends)) > 2, "some end with faults"
