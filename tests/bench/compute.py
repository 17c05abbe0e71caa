#!/usr/bin/env python3
"""Computing in the guest: one static program natively, in our guest, and under QEMU's TCG.

The program is compute.c: ten small loads of a fixed size. In our guest it runs in a session, given
through stdin; under QEMU it is PID 1 of the same kernel with nothing else. Medians over all
repeats of all rounds, or with --best the least of them, which a busy machine disturbs less. The
check value of each load must be the same everywhere.

    python tests/bench/compute.py [--rounds N] [--json [FILE]] [LOAD...]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

from common import host, output, qemu, rounds

from microvm import Machine
from microvm.images import cpio

HERE = Path(__file__).resolve().parent
DEADLINE = 120.0  # seconds for one run of the program
CLOCK_SLACK = 0.02  # part by which a guest's TSC may differ from the host's
NATIVE, OURS, PEER = "native", "microvm", "qemu tcg"
COMPUTING = ("crc32", "tree", "qsort", "matmul", "sha256", "gzip")
SYSTEM = ("getpid", "fork+exec", "pipe", "fault")
GROUPS = {
    "computing": COMPUTING,
    "system": SYSTEM,
    "computing, getpid, fork+exec": (*COMPUTING, "getpid", "fork+exec"),
    "all": (*COMPUTING, *SYSTEM),
}
IN_SESSION = "cat >/tmp/compute && chmod +x /tmp/compute && exec /tmp/compute "


@dataclass(frozen=True, slots=True)
class Sample:
    """One repeat of one load."""

    load: str
    ticks: int
    units: int
    unit: str
    check: str


@dataclass(frozen=True, slots=True)
class Run:
    """What the program wrote, and when: begin and end as (TSC ticks, ns of its clock, our ns)."""

    samples: tuple[Sample, ...]
    begin: tuple[int, int, int]
    end: tuple[int, int, int]

    @property
    def ticks(self) -> int:
        """From begin to end, by the TSC that the program saw."""
        return self.end[0] - self.begin[0]

    @property
    def clock_ns(self) -> int:
        """The same by the program's CLOCK_MONOTONIC."""
        return self.end[1] - self.begin[1]

    @property
    def host_ns(self) -> int:
        """The same by this host's CLOCK_MONOTONIC."""
        return self.end[2] - self.begin[2]


def main() -> None:
    """Measures and prints."""
    parser = output.options(__doc__ or "", rounds=5)
    parser.add_argument("--repeats", type=int, default=3, help="of each load in a run (3)")
    parser.add_argument("--best", action="store_true", help="compare the least times")
    parser.add_argument("loads", nargs="*", metavar="LOAD", help=" ".join(GROUPS["all"]))
    options = parser.parse_args()
    if unknown := set(options.loads) - set(GROUPS["all"]):
        raise host.BenchError(f"no load {', '.join(unknown)}: there are {', '.join(GROUPS['all'])}")
    machine = host.describe()
    plan = Machine(accel="dbt", kernel=options.kernel, memory=options.memory << 20).plan()
    words = ["-n", str(options.repeats), *options.loads]
    with tempfile.TemporaryDirectory() as scratch:
        program = host.compile_static(HERE / "compute.c", Path(scratch) / "compute", "-lz")
        content = program.read_bytes()
        initrd = Path(scratch) / "initrd.cpio"
        initrd.write_bytes(cpio.pack([cpio.regular("init", content, 0o755)]))
        guest = ["--accel", "dbt", "--kernel", plan.kernel.path, "-m", f"{options.memory}M", "-q"]
        session = ["--", "sh", "-c", IN_SESSION + " ".join(words)]
        cmdline = qemu.command_line(plan.image.cmdline, qemu.NO_CALIBRATION, "--", *words)
        peer = qemu.argv(Path(plan.kernel.path), initrd, cmdline, memory_mib=options.memory)
        runs = rounds.take_turns(
            {
                NATIVE: lambda: execute([str(program), *words]),
                OURS: lambda: execute([*host.microvm_argv(), "run", *guest, *session], content),
                PEER: lambda: execute(peer, status=qemu.exit_status),
            },
            options.rounds,
        )
    machine["load_after"] = round(os.getloadavg()[0], 2)
    ns_per_tick = sum(run.clock_ns for run in runs[NATIVE]) / sum(run.ticks for run in runs[NATIVE])
    loads = {name: compare(name, runs, ns_per_tick, options.best) for name in names_of(runs)}
    result: dict[str, object] = {
        "benchmark": "compute",
        "machine": machine,
        "versions": {"microvm": host.microvm_version(), "qemu": qemu.version()},
        "guest": {"kernel": plan.kernel.version, "memory_mib": options.memory},
        "rounds": options.rounds,
        "repeats": options.repeats,
        "compared": "minimum" if options.best else "median",
        "loads": loads,
        "geometric_means": means(loads),
        "clocks": {name: clocks(runs[name], ns_per_tick) for name in runs},
        "warnings": warnings(runs, ns_per_tick),
    }
    output.publish(result, as_text(result), options.json)


def execute(
    argv: Sequence[str],
    content: bytes = b"",
    status: Callable[[int], int] = int,
) -> Run:
    """Runs the program somewhere and reads what it writes. Raises ``BenchError``."""
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stderr,
    ):
        stdin.write(content)
        stdin.seek(0)
        with subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr) as process:
            watchdog = Timer(DEADLINE, process.kill)
            watchdog.start()
            assert process.stdout is not None
            lines = [(line.decode().split(), time.monotonic_ns()) for line in process.stdout]
            process.wait()
            watchdog.cancel()
        stderr.seek(0)
        said = stderr.read()[-1000:].decode(errors="replace")
    marks = {
        words[0]: (int(words[1]), int(words[2]), at)
        for words, at in lines
        if len(words) == 3 and words[0] in ("begin", "end")
    }
    if status(process.returncode) != 0 or set(marks) != {"begin", "end"}:
        said += "\n".join(" ".join(words) for words, _ in lines[-10:])
        raise host.BenchError(f"{argv[0]}: ended with {process.returncode}: {said}")
    samples = (sample(words) for words, _ in lines if len(words) == 5)
    return Run(samples=tuple(samples), begin=marks["begin"], end=marks["end"])


def sample(words: Sequence[str]) -> Sample:
    """One line of the program."""
    load, ticks, units, unit, check = words
    return Sample(load=load, ticks=int(ticks), units=int(units), unit=unit, check=check)


def names_of(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """The loads that ran, in their order."""
    return list(dict.fromkeys(sample.load for sample in runs[NATIVE][0].samples))


def compare(
    load: str, runs: Mapping[str, Sequence[Run]], ns_per_tick: float, best: bool
) -> dict[str, object]:
    """One load: ns a unit everywhere, and what the medians or ``best`` are to each other."""
    samples = {
        name: [sample for run in some for sample in run.samples if sample.load == load]
        for name, some in runs.items()
    }
    times = {
        name: [sample.ticks * ns_per_tick / sample.units for sample in some]
        for name, some in samples.items()
    }
    spreads = {name: rounds.spread(values) for name, values in times.items()}
    typical = {name: at.minimum if best else at.median for name, at in spreads.items()}
    return {
        "unit": samples[NATIVE][0].unit,
        "units": samples[NATIVE][0].units,
        "ns_per_unit": {name: at.as_dict() for name, at in spreads.items()},
        "native_ns": typical[NATIVE],
        "microvm_to_native": typical[OURS] / typical[NATIVE],
        "qemu_to_native": typical[PEER] / typical[NATIVE],
        "qemu_to_microvm": typical[PEER] / typical[OURS],
        "checks_agree": len({s.check for some in samples.values() for s in some}) == 1,
    }


RATIOS = ("microvm_to_native", "qemu_to_native", "qemu_to_microvm")


def means(loads: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, float]]:
    """Geometric means of the ratios, for each group of which all loads ran."""
    return {
        group: {
            ratio: rounds.geometric_mean(float(str(loads[name][ratio])) for name in members)
            for ratio in RATIOS
        }
        for group, members in GROUPS.items()
        if set(members) <= set(loads)
    }


def clocks(runs: Sequence[Run], ns_per_tick: float) -> dict[str, float]:
    """How fast the program's TSC and its clock went, 1.0 being as fast as this host's."""
    return {
        "tsc": statistics.median(run.ticks * ns_per_tick / run.host_ns for run in runs),
        "clock": statistics.median(run.clock_ns / run.host_ns for run in runs),
    }


def warnings(runs: Mapping[str, Sequence[Run]], ns_per_tick: float) -> list[str]:
    """What makes the figures doubtful."""
    told = []
    for load in names_of(runs):
        checks = {
            name: {s.check for run in some for s in run.samples if s.load == load}
            for name, some in runs.items()
        }
        wrong = [name for name in (OURS, PEER) if checks[name] != checks[NATIVE]]
        told += [f"{load}: {name} computes something else than the host" for name in wrong]
    for name, some in runs.items():
        tsc = clocks(some, ns_per_tick)["tsc"]
        if abs(tsc - 1) > CLOCK_SLACK:
            told.append(f"{name}: its TSC goes {tsc:.2f} times as fast as the host's")
    return told


def as_text(result: dict[str, object]) -> str:
    """The table for people."""
    machine, versions, guest = (result[key] for key in ("machine", "versions", "guest"))
    loads, averages, told = (result[key] for key in ("loads", "geometric_means", "warnings"))
    assert isinstance(machine, dict) and isinstance(versions, dict) and isinstance(guest, dict)
    assert isinstance(loads, dict) and isinstance(averages, dict) and isinstance(told, list)
    heading = ["", "native", "", "microvm", "qemu tcg", "qemu/microvm"]
    rows = [heading]
    for name, load in loads.items():
        native = load["native_ns"]
        ratios = [load[ratio] for ratio in RATIOS]
        rows.append([name, f"{native:,.2f} ns", f"a {load['unit']}", *map(factor, ratios)])
    for group, mean in averages.items():
        rows.append([f"mean of {group}", "", "", *(factor(mean[ratio]) for ratio in RATIOS)])
    notes = "".join(f"warning: {line}\n" for line in told)
    return (
        f"Computing in the guest, times of native: Linux {guest['kernel']}, "
        f"{guest['memory_mib']} MiB, {result['compared']} of {result['rounds']} rounds in turn of "
        f"{result['repeats']}\n"
        f"{host.headline(machine)}\n{versions['microvm']}; {versions['qemu']}\n\n"
        f"{output.table(rows)}{notes}"
    )


def factor(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}x"


if __name__ == "__main__":
    sys.exit(output.run(main))
