"""The vsock device alone: MB/s between a descriptor of the host and guest memory (vsock.c).

Beside it, the same bytes through a pipe between two processes (`head | cat`), which no
`microvm run` in a pipeline can beat.

python tests/bench/vsock.py [--rounds N] [--mib N] [--json [FILE]]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.host import ROOT, describe, headline
from common.output import publish, table

CASES = {
    "out, /dev/null": ("out", "/dev/null"),
    "out, pipe": ("out", "-"),
    "in, /dev/zero": ("in", "/dev/zero"),
    "in, pipe": ("in", "-"),
}
PEER = "pipe alone (head | cat)"


def build(directory: Path) -> Path:
    """Compiles vsock.c with the devices."""
    native = ROOT / "native"
    rooms = [native / "core", native / "virtio", native / "devices"]
    sources = [
        Path(__file__).with_suffix(".c"),
        *(c for room in rooms for c in sorted(room.glob("*.c"))),
    ]
    binary = directory / "vsock"
    flags = ["-std=gnu11", "-O2", "-pthread", "-fno-strict-aliasing", f"-I{native / 'include'}"]
    cc = os.environ.get("CC", "cc").split()
    subprocess.run([*cc, *flags, "-o", str(binary), *map(str, sources)], check=True)
    return binary


def pipe_alone(mib: int) -> float:
    """Seconds for `head -c N /dev/zero | cat`, its output thrown away."""
    start = time.monotonic()
    command = f"head -c {mib}M /dev/zero | cat >/dev/null"
    subprocess.run(["sh", "-c", command], check=True)
    return time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--mib", type=int, default=1024, help="MiB a round (1024)")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    options = parser.parse_args()
    machine = describe()
    wall: dict[str, list[float]] = {name: [] for name in (*CASES, PEER)}
    cpu: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as directory:
        binary = build(Path(directory))
        for _ in range(options.rounds):
            for name, (way, file) in CASES.items():
                argv = [str(binary), way, file, str(options.mib)]
                run = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
                for times, value in zip((wall, cpu), run.stdout.split(), strict=True):
                    times[name].append(float(value))
            wall[PEER].append(pipe_alone(options.mib))
    rows = [["vsock device", "MB/s", "CPU s/GB"]]
    results: dict[str, object] = {}
    megabytes = options.mib * (1 << 20) / 1e6
    for name, times in wall.items():
        speed = megabytes / statistics.median(times)
        cost = statistics.median(cpu[name]) / megabytes * 1000 if name in cpu else None
        rows.append([name, f"{speed:.0f}", "" if cost is None else f"{cost:.2f}"])
        results[name] = {"mb_per_s": speed, "cpu_s_per_gb": cost, "seconds": times}
    text = f"{headline(machine)}\n\n{table(rows)}"
    publish({"machine": machine, "results": results}, text, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
