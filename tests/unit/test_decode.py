"""The instruction decoder where no other decoder can be asked: truncation, alignment, units,
and the properties that the translator relies on.

Rerun: python -m pytest tests/unit/test_decode.py
"""

from __future__ import annotations

import random

import pytest
from decoder_under_test import OK, SHORT, TOO_LONG, UD, CDecoder

NO_REG, RIP = 0xFF, 0xFE


@pytest.fixture(scope="module")
def c(tmp_path_factory: pytest.TempPathFactory) -> CDecoder:
    return CDecoder(tmp_path_factory.mktemp("decoder"))


@pytest.mark.parametrize(
    "code",
    [
        "90",
        "488d840d11223344",
        "66f30f10440d11",
        "49b88877665544332211",
        "c4e27d180011223344",
        "c8112233",
        "a11122334455667788",
        "64f0480fc7480811",
        "62f17c48588011223344",
    ],
)
def test_decode_truncated_asks_for_more(c: CDecoder, code: str) -> None:
    case = bytes.fromhex(code)
    length = c.one(case).len
    assert c.one(case).status == OK
    for avail in range(length):
        assert c.one(case, avail=avail).status == SHORT
    assert c.one(case, avail=length).status == OK


def test_decode_fifteen_bytes_is_ok_sixteen_too_long(c: CDecoder) -> None:
    assert c.one(b"\x2e" * 14 + b"\x90", avail=16).len == 15
    assert c.one(b"\x2e" * 15 + b"\x90", avail=16).status == TOO_LONG
    assert c.one(b"\x2e" * 14 + b"\x90", avail=14).status == SHORT


def test_decode_random_bytes_never_use_what_is_beyond(c: CDecoder) -> None:
    rng = random.Random(1)
    cases = [rng.randbytes(15) for _ in range(20000)]
    whole = c.batch(cases, 64)
    other = c.batch([(x[: whole[i].len] + b"\xcc" * 15)[:15] for i, x in enumerate(cases)], 64)
    for i in range(len(cases)):
        if whole[i].status == OK:
            assert other[i].fields == whole[i].fields


@pytest.mark.parametrize(
    ("code", "align"),
    [
        ("0f5803", 16),  # addps
        ("f30f5803", 0),  # addss
        ("0f1003", 0),  # movups
        ("0f2803", 16),  # movaps
        ("660f6003", 16),  # punpcklbw xmm
        ("0f6003", 0),  # punpcklbw mm
        ("f20ff003", 0),  # lddqu
        ("660f3a630308", 0),  # pcmpistri
        ("660f382003", 0),  # pmovsxbw: 8 bytes
        ("660f3adf0301", 16),  # aeskeygenassist
        ("c5f85803", 0),  # vaddps
        ("c5f82803", 16),  # vmovaps xmm
        ("c5fc2803", 32),  # vmovaps ymm
        ("c5fd2b03", 32),  # vmovntpd
        ("c5fa6f03", 0),  # vmovdqu
        ("480fc70b", 16),  # cmpxchg16b
        ("0fc70b", 0),  # cmpxchg8b
        ("0fae03", 16),  # fxsave
        ("0fae23", 64),  # xsave
        ("62f17c482803", 64),  # vmovaps zmm
        ("62f17c485803", 0),  # vaddps zmm
    ],
)
def test_decode_alignment_is_the_manuals(c: CDecoder, code: str, align: int) -> None:
    x = c.one(bytes.fromhex(code))
    assert (x.status, x.mem_align) == (OK, align)


@pytest.mark.parametrize(
    ("code", "unit"),
    [
        ("4801c0", 0),
        ("d8c0", 1),
        ("df0b", 1),  # fisttp: SSE3, yet x87
        ("0ffcc1", 2),
        ("0f7003e4", 2),  # pshufw: SSE, yet on MMX registers
        ("0f77", 2),
        ("0f58c1", 3),
        ("0fae13", 3),  # ldmxcsr
        ("0fae7b01", 0),  # clflush
        ("0fc303", 0),  # movnti
        ("f2480f38f1c1", 0),  # crc32
        ("c5f858c1", 4),
        ("c5f877", 4),
        ("c4e270f2c1", 0),  # andn
        ("62f17c4858c1", 5),
        ("c5f841c1", None),  # kandw with L=0: undefined
        ("c5ec41cb", 5),  # kandw
        ("9b", 6),
    ],
)
def test_decode_unit_says_whose_state_is_used(c: CDecoder, code: str, unit: int | None) -> None:
    x = c.one(bytes.fromhex(code))
    assert (x.unit if x.status == OK else None) == unit


def test_decode_bit_test_names_the_memory_form_alone(c: CDecoder) -> None:
    memory, register = c.one(bytes.fromhex("0fa303")), c.one(bytes.fromhex("0fa3c3"))
    assert c.ops[memory.op] == "BT_MEM_REG"
    assert c.ops[register.op] == "OTHER"


@pytest.mark.parametrize(
    ("code", "op", "size"),
    [
        ("50", "PUSH", 8),
        ("6650", "PUSH", 2),
        ("4850", "PUSH", 8),
        ("6a80", "PUSH", 8),
        ("66c3", "RET", 8),
        ("66e811223344", "CALL_REL", 8),
        ("66ff10", "CALL_IND", 8),
        ("ff18", "CALL_FAR", 4),
        ("cb", "RETF", 4),
        ("48cb", "RETF", 8),
        ("48cf", "IRET", 8),
        ("0f20c0", "MOV_CR_READ", 8),
        ("0f2000", "MOV_CR_READ", 8),  # mod is ignored
        ("48a5", "MOVS", 8),
        ("a4", "MOVS", 1),
        ("48ed", "IN", 4),
        ("488cd8", "MOV_SEG_READ", 8),
        ("4190", "XCHG", 4),
        ("90", "NOP", 4),
        ("f390", "NOP", 4),
    ],
)
def test_decode_operand_size_by_prefixes(c: CDecoder, code: str, op: str, size: int) -> None:
    x = c.one(bytes.fromhex(code))
    assert (c.ops[x.op], x.op_size) == (op, size)


@pytest.mark.parametrize(
    "code",
    [
        "f090",  # LOCK on what is not lockable
        "f001c0",  # LOCK ADD to a register
        "f00f10c1",
        "0f0f031c",  # 3DNow!
        "8fe878c0c111",  # XOP
        "0f01c2",  # VMLAUNCH without VMX
        "0f20c8",  # CR1
        "440f20e8",  # CR13
        "440f21c0",  # DR8
        "8ec8",  # MOV CS
        "8ef0",  # segment register 6
        "06",
        "27",
        "9a112233445566",
        "66c5f858c1",  # VEX with 66
        "40c5f858c1",  # ... with REX
        "f0c5f858c1",
        "c4e178ffc1",  # VEX without such an opcode
        "c4e0f858c1",  # VEX map 0
        "c4e27d90c1",  # gather from a register
    ],
)
def test_decode_undefined_is_refused(c: CDecoder, code: str) -> None:
    assert c.one(bytes.fromhex(code)).status == UD


def test_decode_rip_relative_and_absolute_are_told_apart(c: CDecoder) -> None:
    assert c.one(bytes.fromhex("8b0511223344")).base == RIP
    assert c.one(bytes.fromhex("8b042511223344")).base == NO_REG
    assert c.one(bytes.fromhex("8b0511223344"), bits=32).base == NO_REG


def test_features_every_bit_is_named_once(c: CDecoder) -> None:
    bits = [c.feature_bit(i) for i in range(1, len(c.features))]
    assert len(set(bits)) == len(bits)
    assert all(leaf and 0 <= bit < 32 and 0 <= reg < 4 for leaf, _, reg, bit in bits)
