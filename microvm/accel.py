"""Which backend runs the guest: hardware (KVM) or our translator (dbt), and why.

/dev/kvm says little: it may be absent, forbidden, too old, or emulate every instruction. So KVM is
measured (native/vcpu/kvm/probe.c, under 5 ms) and the verdict kept in the cache until the host
boots again or /dev/kvm changes. The native module is loaded only when there is something to
measure.
"""

from __future__ import annotations

import os

from microvm._record import Record
from microvm.dirs import cache_dir
from microvm.errors import AccelError

_DEVICE = "/dev/kvm"
_CACHE_VERSION = "1"
#: enum mv_kvm_verdict
_VERDICTS = {1: "good", 2: "absent", 3: "forbidden", 4: "old", 5: "useless", 6: "broken"}


class KvmProbe(Record):
    """What was found out about KVM on this host.

    ``verdict``: "good", "absent", "forbidden", "old", "useless" (it emulates guest code) or
    "broken". ``reason`` says it in a sentence, ``advice`` what the user can do, or "".
    ``ns_per_insn``, ``ns_per_exit``: nanoseconds, 0.0 where nothing was measured.
    """

    verdict: str
    reason: str
    advice: str = ""
    ns_per_insn: float = 0.0
    ns_per_exit: float = 0.0


def choose(accel: str) -> tuple[str, str]:
    """The backend for ``--accel ACCEL`` ("auto", "kvm", "dbt"), and why it was chosen.

    Raises AccelError when "kvm" is asked for and cannot work. A slow KVM is used if asked for.
    """
    if accel == "dbt":
        return "dbt", "asked for"
    probe = probe_kvm()
    if accel == "kvm":
        if probe.verdict not in ("good", "useless"):
            raise AccelError(f"--accel kvm: {probe.reason}; {probe.advice}")
        return "kvm", "asked for"
    if probe.verdict == "good":
        return "kvm", probe.reason
    return "dbt", probe.reason


def probe_kvm(*, fresh: bool = False) -> KvmProbe:
    """What KVM is worth here; from the cache unless ``fresh``."""
    try:
        key = _cache_key()
    except FileNotFoundError:
        return _absent()
    known = None if fresh else _read_cache(key)
    if known is None:
        known = _measure()
        if known[0] != "broken":
            _write_cache(key, known)
    return _explain(*known)


def _cache_key() -> str:
    """What the verdict depends on. Raises FileNotFoundError without /dev/kvm."""
    device = os.stat(_DEVICE)
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    groups = ",".join(map(str, os.getgroups()))
    rights = f"{device.st_mode:o}:{device.st_uid}:{device.st_gid}"
    return f"{_CACHE_VERSION} {boot} {device.st_rdev:x} {rights} {os.geteuid()}:{groups}"


def _cache_path() -> str:
    return os.path.join(cache_dir(), "kvm-probe")


def _read_cache(key: str) -> tuple[str, int, str, float, float] | None:
    try:
        with open(_cache_path(), encoding="utf-8") as file:
            lines = file.read().split("\n")
        if lines[0] != key or lines[1] not in _VERDICTS.values():
            return None
        return lines[1], int(lines[2]), lines[3], float(lines[4]), float(lines[5])
    except (OSError, ValueError, IndexError):
        return None


def _write_cache(key: str, known: tuple[str, int, str, float, float]) -> None:
    path = _cache_path()
    partial = f"{path}.{os.getpid()}"
    try:
        os.makedirs(cache_dir(), exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            file.write("\n".join([key, *map(str, known), ""]))
        os.replace(partial, path)
    except OSError:  # no cache: measured again next time
        return


def _measure() -> tuple[str, int, str, float, float]:
    from microvm._native import ffi, lib

    out = ffi.new("struct mv_kvm_probe *")
    lib.mv_kvm_probe(out)
    failed = ffi.string(out.failed).decode()
    return _VERDICTS[out.verdict], -out.error, failed, out.ns_per_insn, out.ns_per_exit


def _absent() -> KvmProbe:
    return KvmProbe(
        verdict="absent",
        reason=f"there is no {_DEVICE}",
        advice="turn virtualization on in the firmware or, in a VM or container, have the host "
        "pass it through; the translator works meanwhile",
    )


def _explain(
    verdict: str, error: int, failed: str, ns_per_insn: float, ns_per_exit: float
) -> KvmProbe:
    if verdict == "absent":
        return _absent()
    if verdict == "forbidden":
        reason = f"{_DEVICE} may not be opened by this user"
        advice = _how_to_be_allowed()
    elif verdict == "old":
        reason = f"this kernel's KVM lacks {failed}"
        advice = "run a newer kernel on the host"
    elif verdict == "useless":
        reason = f"KVM emulates guest code here ({ns_per_insn:.0f} ns an instruction)"
        advice = "use the translator, it is faster; in a VM, have the host allow nesting"
    elif verdict == "broken":
        reason = f"KVM failed: {failed}: {os.strerror(error)}"
        advice = "see the host's kernel log"
    else:
        reason = f"KVM runs guest code at hardware speed ({ns_per_exit / 1000:.1f} us an exit)"
        advice = ""
    return KvmProbe(
        verdict=verdict,
        reason=reason,
        advice=advice,
        ns_per_insn=ns_per_insn,
        ns_per_exit=ns_per_exit,
    )


def _how_to_be_allowed() -> str:
    import grp

    device = os.stat(_DEVICE)
    if device.st_mode & 0o060 != 0o060:
        return f"as root: chgrp kvm {_DEVICE} && chmod 660 {_DEVICE}, and join that group"
    try:
        group = grp.getgrgid(device.st_gid).gr_name
    except KeyError:
        group = str(device.st_gid)
    return f"as root: usermod -aG {group} YOUR-USER, then log in again"
