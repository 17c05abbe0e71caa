"""Guests for tests: bare payloads on the real VMM, and the agent behind a stand-in VMM."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOAD_GPA = 0x1000000

Payload = Callable[[bytes], Path]


def tiny_elf(code: bytes) -> bytes:
    """An ELF64 file with one segment at 16 MiB, entered at its first byte."""
    offset = 0x1000
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, LOAD_GPA, 64, 0, 0, 64, 56, 1, 64, 0, 0
    )
    size = len(code)
    segment = struct.pack("<IIQQQQQQ", 1, 7, offset, LOAD_GPA, LOAD_GPA, size, size, 0x1000)
    return (header + segment).ljust(offset, b"\0") + code


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Payload:
    """Makes a kernel file of machine code that runs in 64-bit mode, interrupts off.

    The cache is the test's own: the user's kernels are not pushed out of theirs.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(code: bytes) -> Path:
        path = tmp_path / "payload.elf"
        path.write_bytes(tiny_elf(code))
        return path

    return make


@pytest.fixture
def no_initrd(tmp_path: Path) -> Path:
    """An empty initramfs."""
    path = tmp_path / "initrd"
    path.write_bytes(b"")
    return path


@pytest.fixture(scope="session")
def guest_init() -> Path:
    """The guest's init, which can serve sessions on the host as well."""
    subprocess.run(["make", "-s", "-C", str(ROOT / "rootfs")], check=True)
    return ROOT / "build/rootfs/init"


class Front:
    """The command line in front of the stand-in VMM."""

    def __init__(self, directory: Path, init: Path, kernel: Path, initrd: Path) -> None:
        self._directory, self._init = directory, init
        self._machine = ["--accel", "dbt", "--kernel", str(kernel), "--initrd", str(initrd)]

    def environment(self, mode: str) -> dict[str, str]:
        """What makes our programs start the stand-in."""
        script = self._directory / f"vmm-{mode}"
        mock = Path(__file__).with_name("mock_vmm.py")
        script.write_text(
            f"#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {mock} {self._init} {mode}\n"
        )
        script.chmod(0o755)
        return {**os.environ, "MICROVM_VMM": str(script), "PYTHONPATH": str(ROOT)}

    def argv(self, *args: str) -> list[str]:
        """A verb and what follows it, with the options for a machine after the verb."""
        return [sys.executable, "-m", "microvm", args[0], *self._machine, *args[1:]]

    def __call__(
        self, *args: str, mode: str = "well", stdin: bytes = b"", timeout: float = 60
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs `microvm VERB ... ARGS`."""
        return subprocess.run(
            self.argv(*args),
            input=stdin,
            capture_output=True,
            timeout=timeout,
            env=self.environment(mode),
            check=False,
        )


@pytest.fixture
def front(tmp_path: Path, guest_init: Path, payload: Payload, no_initrd: Path) -> Iterator[Front]:
    return Front(tmp_path, guest_init, payload(b"\xf4"), no_initrd)


@pytest.fixture(params=["kvm", "dbt"])
def accel(request: pytest.FixtureRequest) -> str:
    """Each backend that this host has."""
    if request.param == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no access to /dev/kvm")
    return str(request.param)
