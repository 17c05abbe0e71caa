"""What every test may ask for: the CLI, the backends, a guest kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).resolve().parent.parent

BACKENDS = ("kvm", "dbt")


class Cli(Protocol):
    """Runs `microvm ARGS...` to its end."""

    def __call__(
        self, *args: str, stdin: bytes = b"", timeout: float = 60, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]: ...


@pytest.fixture(scope="session")
def cli() -> Cli:
    """The command line, as a user calls it. stdout and stderr are kept apart, as bytes.

    A run that is not over after `timeout` seconds fails the test, with what it said.
    """

    def run(
        *args: str, stdin: bytes = b"", timeout: float = 60, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        command: Sequence[str] = [sys.executable, "-m", "microvm", *args]
        try:
            return subprocess.run(
                command,
                input=stdin,
                capture_output=True,
                timeout=timeout,
                env={**os.environ, **(env or {})},
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            pytest.fail(
                f"{' '.join(command)}: not over after {timeout} s\n"
                f"stdout: {late.stdout!r}\nstderr: {late.stderr!r}"
            )

    return run
