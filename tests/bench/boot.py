#!/usr/bin/env python3
"""Cold boot: `microvm run -- true` on the translator against QEMU's TCG, wall clock.

Both start a process, boot the same kernel with the same initramfs and memory into microvm's init,
run `true` in the guest, and end. Ours goes the user's way: Python, a session over vsock, exit
status. In QEMU a small PID 1 (boot_init.c) lets init do all its work, runs `true` itself and ends
the machine: QEMU's guest does a little less.

QEMU takes part twice: with the command line of our guest, and with two more words that spare the
kernel the calibration of timers, which it would do in vain there.

    python tests/bench/boot.py [--rounds N] [--json [FILE]]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from common import host, output, qemu, rounds

from microvm import Machine
from microvm.images import cpio
from microvm.report import POINTS

HERE = Path(__file__).resolve().parent
DEADLINE = 60.0  # seconds for one boot
TIMELINE_ROUNDS = 5
OURS, PEER, PEER_TUNED = "microvm", "qemu tcg", "qemu tcg, no calibration"


def main() -> None:
    """Measures and prints."""
    parser = output.options(__doc__ or "", rounds=12)
    options = parser.parse_args()
    machine = host.describe()
    plan = Machine(accel="dbt", kernel=options.kernel, memory=options.memory << 20).plan()
    guest = ["--accel", "dbt", "--kernel", plan.kernel.path, "-m", f"{options.memory}M", "-q"]
    ours = [*host.microvm_argv(), "run", *guest]
    with tempfile.TemporaryDirectory() as scratch:
        initrd = peer_initrd(plan.initrds, Path(scratch))
        cmdline = qemu.command_line(plan.image.cmdline, "rdinit=/bench/init")
        peers = {
            name: qemu.argv(Path(plan.kernel.path), initrd, words, memory_mib=options.memory)
            for name, words in (
                (PEER, cmdline),
                (PEER_TUNED, f"{cmdline} {qemu.NO_CALIBRATION}"),
            )
        }
        contenders = {OURS: partial(timed, [*ours, "--", "true"])}
        contenders |= {name: partial(timed, argv, qemu.exit_status) for name, argv in peers.items()}
        taken = rounds.take_turns(contenders, options.rounds, warm_up=1)
        phases, work = timeline(ours, Path(scratch) / "report.json")
    walls = {name: [took.wall for took in some] for name, some in taken.items()}
    cpus = {name: [took.cpu for took in some] for name, some in taken.items()}
    machine["load_after"] = round(os.getloadavg()[0], 2)
    result: dict[str, object] = {
        "benchmark": "boot",
        "machine": machine,
        "versions": {"microvm": host.microvm_version(), "qemu": qemu.version()},
        "guest": {
            "kernel": plan.kernel.version,
            "initramfs_bytes": sum(os.path.getsize(path) for path in plan.initrds),
            "memory_mib": options.memory,
            "cmdline": plan.image.cmdline,
        },
        "wall_seconds": {name: rounds.spread(values).as_dict() for name, values in walls.items()},
        "cpu_seconds": {name: rounds.spread(values).as_dict() for name, values in cpus.items()},
        "walls": walls,
        "ratios": {
            name: {
                "of_medians": rounds.ratio(walls[name], walls[OURS]),
                "paired": rounds.paired_ratio(walls[name], walls[OURS]),
            }
            for name in peers
        },
        "phases_ns": phases,
        "work": work,
    }
    output.publish(result, as_text(result, walls, cpus, phases, work), options.json)


def peer_initrd(initrds: Sequence[str], scratch: Path) -> Path:
    """Our initramfs, followed by an archive with the PID 1 that ends the machine."""
    init = host.compile_static(HERE / "boot_init.c", scratch / "init", guest=True)
    entries = [cpio.directory("bench"), cpio.regular("bench/init", init.read_bytes(), 0o755)]
    path = scratch / "initrd.cpio"
    path.write_bytes(b"".join(Path(part).read_bytes() for part in initrds) + cpio.pack(entries))
    return path


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds from the start of a process to its end; ``cpu``: of it and all that it waited for."""

    wall: float
    cpu: float


def timed(argv: Sequence[str], status: Callable[[int], int] = int) -> Took:
    """How long a process takes.

    ``status`` makes its return code 0 if all went well. Raises ``BenchError``.
    """
    start, before = time.perf_counter(), os.times()
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE, text=True
        )
    except subprocess.TimeoutExpired as error:
        raise host.BenchError(f"{argv[0]}: no end after {DEADLINE:.0f} s") from error
    wall, after = time.perf_counter() - start, os.times()
    if status(done.returncode) != 0:
        said = (done.stderr or done.stdout)[-2000:]
        raise host.BenchError(f"{argv[0]}: ended with {done.returncode}: {said}")
    cpu = after.children_user + after.children_system
    return Took(wall=wall, cpu=cpu - before.children_user - before.children_system)


def timeline(ours: Sequence[str], report: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Medians of our phases in ns, and what the vCPU did; measured apart from the race."""
    runs: list[dict[str, float]] = []
    for _ in range(TIMELINE_ROUNDS):
        wall = timed([*ours, "--report", str(report), "--", "true"]).wall
        told = json.loads(report.read_bytes())
        points = {**told["timeline"], "end": wall * 1e9}
        names = [name for name in (*POINTS, "end") if name in points]
        runs.append(
            {
                f"{before} to {after}": points[after] - points[before]
                for before, after in pairwise(names)
            }
        )
    timed([*ours, "--count", "--report", str(report), "--", "true"])
    counted = json.loads(report.read_bytes())
    phases = {name: rounds.spread([run[name] for run in runs]).median for name in runs[0]}
    return phases, {**counted["counters"], **{f"exits_{k}": n for k, n in counted["exits"].items()}}


def as_text(
    result: dict[str, object],
    walls: dict[str, list[float]],
    cpus: dict[str, list[float]],
    phases: dict[str, float],
    work: dict[str, int],
) -> str:
    """The table for people."""
    machine, versions, guest = (result[key] for key in ("machine", "versions", "guest"))
    assert isinstance(machine, dict) and isinstance(versions, dict) and isinstance(guest, dict)
    rows = [["", "median ms", "min", "max", "IQR", "x microvm", "CPU ms"]]
    for name, values in walls.items():
        at = rounds.spread(values)
        cells = [f"{1e3 * value:.1f}" for value in (at.median, at.minimum, at.maximum, at.iqr)]
        cpu = rounds.spread(cpus[name]).median
        rows.append([name, *cells, f"{rounds.ratio(values, walls[OURS]):.2f}", f"{1e3 * cpu:.0f}"])
    steps = [["phase of ours", "ms"], *([name, f"{ns / 1e6:.1f}"] for name, ns in phases.items())]
    counts = ", ".join(f"{number:,} {name}" for name, number in work.items() if number)
    return (
        f"Cold boot to `true` and back: Linux {guest['kernel']}, {guest['memory_mib']} MiB, "
        f"{len(walls[OURS])} rounds in turn\n{host.headline(machine)}\n"
        f"{versions['microvm']}; {versions['qemu']}\n\n"
        f"{output.table(rows)}\n{output.table(steps)}\ncounted: {counts}\n"
    )


if __name__ == "__main__":
    sys.exit(output.run(main))
