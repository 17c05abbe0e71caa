"""Random guests against the virtio devices, under ASan and UBSan (virtio_fuzz.c).

2 seconds by default; MICROVM_FUZZ_SECONDS=600 for a night's worth. A failure leaves its input:

    build/tests/virtio_fuzz FILE
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fuzzer() -> Path:
    native = ROOT / "native"
    rooms = [native / "core", native / "virtio", native / "devices"]
    sources = [
        Path(__file__).with_name("virtio_fuzz.c"),
        *(c for room in rooms for c in sorted(room.glob("*.c"))),
    ]
    headers = [h for room in (*rooms, native / "include/mv") for h in room.glob("*.h")]
    out = ROOT / "build" / "tests" / "virtio_fuzz"
    newest = max(path.stat().st_mtime for path in (*sources, *headers))
    if out.exists() and out.stat().st_mtime > newest:
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            *os.environ.get("CC", "cc").split(),
            *("-std=gnu11", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"),
            *("-fno-strict-aliasing", "-fsanitize=address,undefined"),
            *("-fno-sanitize-recover=undefined", f"-I{native / 'include'}", "-o", str(out)),
            *map(str, sources),
        ],
        check=True,
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
    )
    return out


def test_virtio_random_guest_finds_no_memory_error(fuzzer: Path, tmp_path: Path) -> None:
    seconds = os.environ.get("MICROVM_FUZZ_SECONDS", "2")
    seed = str(time.time_ns())
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    env["ASAN_OPTIONS"] = "detect_leaks=1"
    run = subprocess.run(
        [fuzzer, seconds, seed],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        timeout=float(seconds) + 60,
        check=False,
    )
    if run.returncode:
        kept = fuzzer.with_name(f"virtio_fuzz.{seed}")
        shutil.copy(tmp_path / "virtio_fuzz.input", kept)
        pytest.fail(f"seed {seed}; again: {fuzzer} {kept}\n{run.stderr.decode()[-4000:]}")
