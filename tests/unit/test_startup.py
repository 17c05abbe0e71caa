"""The way to the guest's first instruction stays short: what it must not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Each costs more than a millisecond, most of them ten; none is needed before the guest runs.
HEAVY = frozenset(
    "argparse asyncio cffi dataclasses elftools enum inspect json logging pathlib re shutil signal"
    " socket subprocess tempfile threading tqdm trio typing urllib zstandard".split()
)


@pytest.mark.parametrize(
    "modules", ["microvm", "microvm.cli.run", "microvm.cli.shell", "microvm.machine, microvm.plan"]
)
def test_startup_imports_nothing_heavy(modules: str) -> None:
    code = f"import {modules}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not HEAVY & set(done.stdout.split())
