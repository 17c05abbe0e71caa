"""The translator's system level: delivery, IRET, segments, control registers, MSRs, APICs, state.

Each test is a C function of tests/unit/native/system_test.c, run in a process of its own against
a flat memory, with the address and undefined-behaviour sanitizers.

python -m pytest tests/unit/test_system.py
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEST = ROOT / "tests/unit/native/system_test.c"
DBT = ROOT / "native/vcpu/dbt"
SOURCES = [
    *(
        DBT / f"{name}.c"
        for name in (
            "system operand segment control syscall far interrupt msr port pvclock clock "
            "alarm apic ioapic state decode insn_table"
        ).split()
    ),
    ROOT / "native/vcpu/cpuid.c",
    ROOT / "native/vcpu/features.c",
]
NAMES = re.findall(r"^TEST\((\w+)\)", TEST.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test program, compiled."""
    out = tmp_path_factory.mktemp("system")
    (out / "system_tests.inc").write_text("".join(f"ENTRY({name}),\n" for name in NAMES))
    subprocess.run(
        ["cc", "-std=gnu11", "-O1", "-g", "-pthread",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-strict-aliasing",
         f"-I{ROOT}/native/include", f"-I{DBT}", f"-I{out}", "-o", out / "system_test", TEST,
         *SOURCES],
        check=True,
    )  # fmt: skip
    return out / "system_test"


@pytest.mark.parametrize("name", NAMES)
def test_system(program: Path, name: str) -> None:
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{program} {name}\n{done.stderr}"
