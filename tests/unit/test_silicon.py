"""The translator against the host's silicon, every encoding of the instruction table.

A failure names the round's seed: MICROVM_SEED=SEED runs that round again.
More rounds: MICROVM_FUZZ_SECONDS=600 (`make fuzz`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from microvm._native import lib
from microvm.testing import silicon

XCR0 = 7  #: x87, SSE, AVX
SEED = os.environ.get("MICROVM_SEED", "1")

#: Switches that must change nothing but speed.
OPTIONS: dict[str, dict[str, int]] = {
    "default": {},
    "flags-always-live": {"no_flags_live": 1},
    "no-tlb": {"no_tlb": 1},
    "no-chain": {"no_chain": 1, "no_coalesce": 1},
    "one-instruction-blocks": {"max_insns": 1},
}


#: Rows that only 16- and 32-bit code reaches. Opcode 82 repeats group 1 of opcode 80.
NOT_IN_64_BIT_MODE = set(
    "push es,push cs,push ss,push ds,pop es,pop ss,pop ds,daa,das,aaa,aas,aam,aad,salc,inc,dec,"
    "pusha,popa,bound,arpl,into,les,lds,call far,jmp far,add,or,adc,sbb,and,sub,xor,cmp".split(",")
)


@pytest.fixture(scope="module")
def all_encodings() -> list[silicon.Encoding]:
    return silicon.encodings()


def rounds(seed: str) -> Iterator[str]:
    """One round's seed; more while there is time."""
    until = time.monotonic() + float(os.environ.get("MICROVM_FUZZ_SECONDS", "0")) / len(OPTIONS)
    yield seed
    number = 0
    while time.monotonic() < until:
        number += 1
        yield f"{seed}.{number}"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_silicon_every_encoding_agrees(
    all_encodings: list[silicon.Encoding], options: dict[str, int]
) -> None:
    with silicon.SiliconGuest("dbt", xcr0=XCR0, options=options) as guest:
        for seed in rounds(SEED):
            cases = (
                silicon.make_case(encoding, f"{seed}/{i}", XCR0)
                for i, encoding in enumerate(all_encodings)
            )
            wrong = silicon.compare(guest, cases, exact_flags="no_flags_live" in options)
            report = "\n".join(f"{case}: {'; '.join(found)}" for case, found in wrong[:20])
            assert not wrong, f"{len(wrong)} cases differ, seed {seed}:\n{report}"


def test_silicon_every_row_has_an_encoding() -> None:
    reached = {encoding.row for encoding, _ in silicon.all_encodings()}
    missing = {silicon.row_name(row) for row in range(1, lib.mv_row_count) if row not in reached}
    assert missing <= NOT_IN_64_BIT_MODE


@pytest.mark.parametrize("name", ["add", "div", "movups", "fld", "movs"])
def test_silicon_native_run_twice_is_the_same(
    all_encodings: list[silicon.Encoding], name: str
) -> None:
    cases = [
        silicon.make_case(encoding, f"twice/{i}", XCR0)
        for i, encoding in enumerate(all_encodings)
        if encoding.name.startswith(name)
    ]
    first, second = silicon.run_natively(cases), silicon.run_natively(cases)
    for i, case in enumerate(cases):
        assert silicon.differences(case, first[i], second[i]) == []
