"""Random damage to kernel files: whatever the loader gets, it gives a kernel or a ConfigError.

More rounds, other seeds: MICROVM_FUZZ_ROUNDS=100000 MICROVM_FUZZ_SEED=7 pytest tests/fuzz
"""

from __future__ import annotations

import os
import random

import pytest
from kernel_files import BANNER, COMPRESSED, MIB, Load, bzimage, elf

from microvm import layout
from microvm.boot import bzimage as bzimage_module
from microvm.boot import flat
from microvm.errors import ConfigError

ROUNDS = int(os.environ.get("MICROVM_FUZZ_ROUNDS", "150"))
SEED = int(os.environ.get("MICROVM_FUZZ_SEED", "1"))

_ODD = (0, 1, 0x7F, 0x80, 0xFF)
_VMLINUX = elf(
    (
        Load(16 * MIB, b"\xf4" * 700 + BANNER),
        Load(17 * MIB, b"\x11" * 300, memsz=9000),
        Load(18 * MIB + 0x123, b"\x22" * 64),
    )
)


def damaged(data: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, mostly in the headers, and now and then the end cut off."""
    copy = bytearray(data)
    for _ in range(dice.randint(1, 8)):
        at = dice.randrange(min(len(copy), dice.choice((64, 300, 0x270, 1 << 30))))
        copy[at] = dice.choice((*_ODD, dice.randrange(256)))
    if dice.random() < 0.1:
        del copy[dice.randrange(len(copy)) :]
    return bytes(copy)


@pytest.mark.parametrize("method", ["elf", *COMPRESSED])
def test_fuzz_kernel_file_gives_a_kernel_or_a_config_error(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bzimage_module, "UNPACKED_MAX", 16 * MIB)
    monkeypatch.setattr(flat, "_SPAN_MAX", 64 * MIB)
    dice = random.Random(f"{SEED} {method}")
    whole = _VMLINUX if method == "elf" else bzimage(COMPRESSED[method](_VMLINUX))
    for number in range(ROUNDS):
        data = damaged(whole, dice)
        try:
            parsed = flat.parse_bytes(data, "kernel")
        except ConfigError as error:
            assert str(error).startswith("kernel: "), f"round {number}"
            assert "\n" not in str(error), f"round {number}"
            continue
        assert layout.HIGH_RAM_GPA <= parsed.base <= parsed.entry < parsed.end, f"round {number}"
        assert parsed.end <= layout.RAM_LOW_END, f"round {number}"
        assert len(parsed.memory) <= 65 * MIB, f"round {number}"
