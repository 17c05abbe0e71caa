"""``python -m microvm``."""

from __future__ import annotations

from microvm.cli import entry

if __name__ == "__main__":
    entry()
