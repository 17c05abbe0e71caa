"""The C decoder, built into a shared object of its own and called in batches."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DBT = ROOT / "native" / "vcpu" / "dbt"

#: What decode_shim.c writes for each instruction, in its order.
FIELDS = (
    "status len cls op enc map opcode lock rep repne segment rex op_size addr_size cc opcode_off"
    " modrm_off sib_off disp_off imm_off disp_len imm_len has_mem mem_access mem_size mem_align"
    " base index scale disp imm imm2 gpr_read gpr_written flags_read flags_killed flags_written"
    " feature feature2 unit row"
    " reg_reg reg_access reg_size reg_high8 rm_reg rm_access rm_size rm_high8"
    " vvvv_reg vvvv_access vvvv_size vvvv_high8 opreg_reg opreg_access opreg_size opreg_high8"
).split()
SLOT = 16

OK, SHORT, TOO_LONG, UD = range(4)
MODES = {64: 0, 32: 1, 16: 2}


@dataclass(slots=True)
class Decoded:
    """One instruction as the C decoder sees it: the fields of struct mv_insn, by name."""

    fields: dict[str, int]

    def __getattr__(self, name: str) -> int:
        return self.fields[name]


class CDecoder:
    """mv_decode() of a freshly built decode.c and insn_table.c."""

    def __init__(self, build_dir: Path) -> None:
        self._lib = ctypes.CDLL(str(_build(build_dir)))
        self._lib.row_name.restype = ctypes.c_char_p
        self.row_count: int = self._lib.row_count()
        self.classes = enum_names("mv_class", "MV_CLASS_")
        self.ops = enum_names("mv_op", "MV_OP_")
        self.features = self._features()

    def batch(self, cases: Sequence[bytes], bits: int, avail: int = 15) -> Batch:
        """Decodes each case (at most 16 bytes; shorter ones are padded with zeros)."""
        data = b"".join(case.ljust(SLOT, b"\0") for case in cases)
        out = (ctypes.c_int64 * (len(FIELDS) * len(cases)))()
        width = self._lib.decode_batch(data, len(cases), avail, MODES[bits], out)
        assert not cases or width == len(FIELDS), "decode_shim.c and FIELDS differ"
        return Batch(out, len(cases))

    def rows_reached(self, cases: Sequence[bytes], bits: int) -> set[int]:
        """Numbers of the rows that the cases (at most 16 bytes) decode to."""
        seen = (ctypes.c_uint8 * self.row_count)()
        data = b"".join(case.ljust(SLOT, b"\0") for case in cases)
        self._lib.mark_rows(data, len(cases), MODES[bits], seen)
        return {row for row, mark in enumerate(seen) if mark}

    def one(self, case: bytes, bits: int = 64, avail: int = 15) -> Decoded:
        """Decodes one instruction."""
        return self.batch([case], bits, avail)[0]

    def name(self, row: int) -> str:
        """Mnemonic of a row of the table."""
        text: bytes = self._lib.row_name(row)
        return text.decode()

    def _features(self) -> list[str]:
        header = (ROOT / "native/include/mv/features.h").read_text()
        return ["BASE", *re.findall(r"^  X\((\w+), 0x", header, re.M)]

    def feature_bit(self, feature: int) -> tuple[int, int, int, int]:
        """(leaf, subleaf, register 0..3, bit) of a feature's number."""
        out = (ctypes.c_int * 4)()
        assert self._lib.feature_bit(feature, out) == 0
        return (out[0] & 0xFFFFFFFF, out[1], out[2], out[3])


class Batch:
    """Results of a batch; fields are read without copying them all."""

    def __init__(self, raw: ctypes.Array[ctypes.c_int64], count: int) -> None:
        self._raw = raw
        self.count = count

    def status_len(self, i: int) -> tuple[int, int]:
        """Status and length of case i."""
        at = i * len(FIELDS)
        return self._raw[at], self._raw[at + 1]

    def __getitem__(self, i: int) -> Decoded:
        at = i * len(FIELDS)
        return Decoded(dict(zip(FIELDS, self._raw[at : at + len(FIELDS)], strict=True)))


def enum_names(enum: str, prefix: str) -> list[str]:
    """Names of a C enum of insn.h that counts from 0, without their prefix."""
    text = (DBT / "insn.h").read_text()
    match = re.search(rf"enum {enum} \{{(.*?)\}};", text, re.S)
    assert match is not None
    body = re.sub(r"/\*.*?\*/", "", match.group(1), flags=re.S)
    return [name.removeprefix(prefix) for name in re.findall(r"\bMV_\w+", body)]


def _build(build_dir: Path) -> Path:
    so = build_dir / "decoder.so"
    sources = [
        Path(__file__).with_name("decode_shim.c"),
        DBT / "decode.c",
        DBT / "insn_table.c",
        ROOT / "native/vcpu/features.c",
    ]
    subprocess.run(
        [
            *os.environ.get("CC", "cc").split(),
            *("-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"),
            *(f"-I{ROOT / 'native/include'}", f"-I{DBT}", "-o", str(so)),
            *map(str, sources),
        ],
        check=True,
    )
    return so
