"""microvm.layout repeats native/include/mv/layout.h and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from microvm import layout

HEADER = Path(__file__).resolve().parent.parent.parent / "native/include/mv/layout.h"


def header_values() -> dict[str, int]:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    pairs = re.findall(r"#define MV_(\w+)[ \t]+(\S.*)", text)
    pairs += re.findall(r"MV_(EVENT_\w+) = (\d+)", text)
    numbers = {}
    for name, value in pairs:
        plain = re.sub(r"(?<=[0-9a-fA-F])U?LL\b", "", value).strip()
        if re.fullmatch(r"[0-9a-fA-Fx()<>+*\- ]+", plain):
            numbers[name] = int(eval(plain))
    return numbers


def test_layout_every_name_equals_the_header() -> None:
    ours = {name: value for name, value in vars(layout).items() if name.isupper()}
    values = header_values()
    assert ours
    assert {name: values.get(name) for name in ours} == ours
