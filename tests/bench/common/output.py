"""Options, tables and JSON of a benchmark."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from common.host import BenchError


def options(text: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"({rounds})")
    parser.add_argument("--kernel", help="vmlinux or a name of the store (microvm's default)")
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help="(256)")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="results as JSON, to stdout or a file"
    )
    return parser


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, the first row a heading, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines) + "\n"


def publish(result: dict[str, object], text: str, where: str | None) -> None:
    """The table, or JSON in its place on stdout (``where`` is "-"), or both with JSON in a file."""
    encoded = json.dumps(result, indent=2) + "\n"
    if where == "-":
        sys.stdout.write(encoded)
        return
    sys.stdout.write(text)
    if where:
        with open(where, "w", encoding="utf-8") as file:
            file.write(encoded)


def run(main: Callable[[], None]) -> int:
    """Runs a benchmark; its exit status. What cannot be measured gets one line."""
    from microvm.errors import MicrovmError

    try:
        main()
    except (BenchError, MicrovmError) as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return 1
    return 0
