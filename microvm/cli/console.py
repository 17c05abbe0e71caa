"""The guest's last words, fit for a terminal."""

from __future__ import annotations

_LINES = 40  # a panic with its call trace
_WIDTH = 200


def printable(line: str) -> str:
    """The line without what could steer a terminal: the guest wrote it."""
    clean = "".join(c if c.isprintable() else " " if c == "\t" else "" for c in line)
    return clean[:_WIDTH]


def tail(console: str, lines: int = _LINES) -> str:
    """The last lines of a console, each marked as the guest's."""
    kept = [text for line in console.splitlines() if (text := printable(line).rstrip())]
    return "".join(f"| {line}\n" for line in kept[-lines:])
