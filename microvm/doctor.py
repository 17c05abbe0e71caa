"""What this host offers to guests: the data of ``microvm doctor``.

Nothing here starts a guest; each finding says what was found and what the user can do about it.
"""

from __future__ import annotations

import mmap
import os
import platform
import sys
from collections.abc import Iterator

from microvm._record import Record
from microvm.accel import choose, probe_kvm
from microvm.errors import MicrovmError

#: What the translator's own code needs of the processor (CPUID's names in /proc/cpuinfo).
_DBT_NEEDS = ("lahf_lm", "cx16", "fxsr", "xsave", "sse4_2")
#: What makes it faster, or is offered to guests where the host has it.
_DBT_LIKES = ("fsgsbase", "avx2", "bmi2", "constant_tsc", "nonstop_tsc")


class Finding(Record):
    """One thing that was looked at.

    ``state``: "ok", "note" (works, could be better) or "bad" (something will not work).
    ``advice``: what the user can do, or "".
    """

    name: str
    state: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Looks at this host anew; nothing comes from a cache."""
    return list(_findings())


def _findings() -> Iterator[Finding]:
    yield _processor()
    kvm = probe_kvm(fresh=True)
    yield Finding(
        name="kvm",
        state="ok" if kvm.verdict == "good" else "note",
        found=kvm.reason,
        advice=kvm.advice,
    )
    yield _translator()
    accel, why = choose("auto")
    yield Finding(name="accel", state="ok", found=f"{accel} is used: {why}")
    yield _native()
    yield _kernel()
    yield _memory()
    yield _huge_pages()
    yield _fuse()
    yield _python()


def _cpu_info() -> tuple[str, frozenset[str]]:
    """Model and flags of the first CPU."""
    model, flags = "unknown", frozenset[str]()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = frozenset(value.split())
                break
    return model, flags


def _processor() -> Finding:
    model, _ = _cpu_info()
    found = f"{model}, {os.cpu_count()} CPUs"
    if platform.machine() != "x86_64":
        return Finding(
            name="cpu",
            state="bad",
            found=f"{platform.machine()}: {found}",
            advice="guests are x86-64 and need an x86-64 host",
        )
    return Finding(name="cpu", state="ok", found=found)


def _translator() -> Finding:
    _, flags = _cpu_info()
    missing = [flag for flag in _DBT_NEEDS if flag not in flags]
    if missing:
        return Finding(
            name="translator",
            state="bad",
            found=f"the processor lacks {', '.join(missing)}",
            advice="it needs a processor of 2008 or newer (in a VM: a CPU model that has these)",
        )
    problem = _executable_memory_problem()
    if problem:
        return Finding(
            name="translator",
            state="bad",
            found=f"memory cannot be made executable: {problem}",
            advice="sysctl vm.memfd_noexec=0; under SELinux, allow execmem",
        )
    absent = [flag for flag in _DBT_LIKES if flag not in flags]
    return Finding(
        name="translator",
        state="note" if absent else "ok",
        found=f"works; the processor has no {', '.join(absent)}" if absent else "works",
    )


def _executable_memory_problem() -> str:
    """Why the translator's code cache cannot be had, or ""."""
    try:
        fd = os.memfd_create("microvm-doctor")
    except OSError as error:
        return f"memfd_create: {error.strerror}"
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
    except OSError as error:
        return f"mmap: {error.strerror}"
    finally:
        os.close(fd)
    return ""


def _native() -> Finding:
    from microvm.vmm import executable

    try:
        return Finding(name="vmm", state="ok", found=executable())
    except MicrovmError as error:
        return Finding(name="vmm", state="bad", found=str(error), advice="make build")


def _kernel() -> Finding:
    from microvm.images.kernels import default_kernel

    try:
        kernel = default_kernel()
    except MicrovmError as error:
        return Finding(
            name="kernel",
            state="bad",
            found=str(error),
            advice="microvm kernel pull (seconds) or microvm kernel build (minutes, boots faster)",
        )
    return Finding(name="kernel", state="ok", found=f"{kernel.name}: {kernel.path}")


def _meminfo(key: str) -> int:
    """A field of /proc/meminfo, in bytes; 0 if there is none."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) * 1024
    return 0


def _memory() -> Finding:
    available = _meminfo("MemAvailable") >> 20
    with open("/proc/sys/vm/overcommit_memory", encoding="ascii") as file:
        strict = file.read().strip() == "2"
    found = f"{available} MiB available"
    if available < 128:
        return Finding(
            name="memory", state="bad", found=found, advice="a guest wants 128 MiB or more"
        )
    if strict:
        return Finding(
            name="memory",
            state="note",
            found=f"{found}; overcommit is off, so a guest's whole memory is reserved",
            advice="sysctl vm.overcommit_memory=0, or give guests less (-m)",
        )
    return Finding(name="memory", state="ok", found=found)


def _huge_pages() -> Finding:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
            chosen = file.read().partition("[")[2].partition("]")[0]
    except OSError:
        chosen = "absent"
    if chosen in ("always", "madvise"):
        return Finding(name="huge pages", state="ok", found=f"transparent: {chosen}")
    return Finding(
        name="huge pages",
        state="note",
        found=f"transparent: {chosen}",
        advice="echo madvise > /sys/kernel/mm/transparent_hugepage/enabled saves time in boot",
    )


def _fuse() -> Finding:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Finding(
            name="fuse",
            state="note",
            found=f"/dev/fuse: {error.strerror}",
            advice="needed only to mount a guest's files on the host: modprobe fuse",
        )
    return Finding(name="fuse", state="ok", found="/dev/fuse can be used")


def _python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable})"
    return Finding(name="python", state="ok", found=found)
