"""The machine that measures, and tools on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
QUIET_LOAD = 0.5  # runnable tasks; above it times are not to be quoted


class BenchError(Exception):
    """It cannot be measured; the message says what to do."""


def describe() -> dict[str, object]:
    """CPU, kernel, memory and load of this machine, for JSON."""
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "kernel": platform.release(),
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def headline(machine: dict[str, object]) -> str:
    """The same in a line, with a word about the load."""
    load = float(str(machine["load_before"]))
    busy = "" if load < QUIET_LOAD else ": busy, do not quote"
    return (
        f"{machine['cpus']} x {machine['cpu']}, Linux {machine['kernel']}, "
        f"{machine['distribution']}, load {load}{busy}"
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def find_tool(name: str, package: str) -> str:
    """Path of a program. Raises ``BenchError`` if it is not installed."""
    path = shutil.which(name)
    if path is None:
        raise BenchError(f"{name} is not installed: apt-get install {package}")
    return path


def compile_static(source: Path, out: Path, *libraries: str, guest: bool = False) -> Path:
    """Compiles one C file into a static program, with musl for the ``guest`` if it is there.

    Raises ``BenchError``.
    """
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s"]
    cc = os.environ.get("CC", "cc").split()
    if guest:
        cc = [shutil.which("musl-gcc") or cc[0]]
    argv = [*cc, *flags, "-o", str(out), str(source), *libraries]
    done = subprocess.run(argv, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise BenchError(f"cannot compile {source.name}:\n{done.stderr}")
    return out


def microvm_argv() -> list[str]:
    """The command ``microvm`` that belongs to this Python, as a user would call it."""
    script = Path(sys.executable).with_name("microvm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "microvm"]


def microvm_version() -> str:
    """What `microvm --version` says."""
    argv = [*microvm_argv(), "--version"]
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
