"""Where files live between runs: the XDG base directories, one folder of ours in each."""

from __future__ import annotations

import os


def cache_dir() -> str:
    """``$XDG_CACHE_HOME/microvm``: what can be made again. It need not exist."""
    return _ours("XDG_CACHE_HOME", ".cache")


def data_dir() -> str:
    """``$XDG_DATA_HOME/microvm``: what the user asked to keep. It need not exist."""
    return _ours("XDG_DATA_HOME", ".local/share")


def _ours(variable: str, default: str) -> str:
    base = os.environ.get(variable, "")
    if not base.startswith("/"):  # the specification says: a relative path is invalid, ignore it
        base = os.path.join(os.path.expanduser("~"), default)
    return os.path.join(base, "microvm")
