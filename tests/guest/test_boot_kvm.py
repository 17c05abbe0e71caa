"""Linux on KVM; where KVM emulates, the translator takes over what it cannot.

MICROVM_SLOW=1 .venv/bin/python -m pytest tests/guest/test_boot_kvm.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from microvm.accel import probe_kvm
from tests.conftest import Cli


def test_kvm_boots_linux(cli: Cli, tmp_path: Path) -> None:
    probe = probe_kvm()
    if probe.verdict not in ("good", "useless"):
        pytest.skip(probe.reason)
    if probe.verdict == "useless" and not os.environ.get("MICROVM_SLOW"):
        pytest.skip("KVM emulates here and takes a minute or two: MICROVM_SLOW=1 boots it")
    report = tmp_path / "report.json"
    done = cli(
        *("run", "--accel", "kvm", "--timeout", "500s", "--report", str(report)),
        *("--", "sh", "-c", "uname -s; exit 7"),
        timeout=520,
    )
    assert (done.returncode, done.stdout) == (7, b"Linux\n"), done.stderr.decode()
    exits = json.loads(report.read_text())["exits"]
    assert bool(exits.get("emulate")) == (probe.verdict == "useless")
