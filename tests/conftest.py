"""What every test may ask for: the CLI, the backends, a guest kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

import pytest

from microvm.accel import probe_kvm
from microvm.testing.bare import Bare, Outcome

#: Backends as tests name them, with the translator's switches. The second form of the translator
#: does everything the slow way; it must do the same.
BACKENDS: dict[str, tuple[str, dict[str, int]]] = {
    "kvm": ("kvm", {}),
    "dbt": ("dbt", {}),
    "dbt-plain": ("dbt", {"no_chain": 1, "no_tlb": 1, "no_coalesce": 1, "max_insns": 1}),
}


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


class _Machine(Bare):
    """A bare machine whose KVM may lack instructions: what it cannot emulate is no verdict."""

    def go(self, timeout: float = 5.0) -> Outcome:
        out = super().go(timeout)
        if out.reason == "emulate":
            pytest.skip("this host's KVM cannot emulate an instruction of the payload")
        return out


def _skip_without_kvm(backend: str) -> None:
    if backend == "kvm" and (probe := probe_kvm()).verdict not in ("good", "useless"):
        pytest.skip(probe.reason)


@pytest.fixture(params=["kvm", "dbt"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that works here."""
    name = str(request.param)
    _skip_without_kvm(name)
    return name


@pytest.fixture(params=BACKENDS)
def machine(request: pytest.FixtureRequest) -> Iterator[Bare]:
    """A bare 64-bit machine on each backend that works here."""
    name, options = BACKENDS[request.param]
    _skip_without_kvm(name)
    with _Machine(name, options=options) as machine:
        yield machine
