"""Translations kept between starts: used if they are what they were, harmless if not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

KERNELS = "microvm/kernels"
Start = Callable[..., dict[str, int]]


@pytest.fixture
def start(cli: Any, tmp_path: Path) -> Start:
    """Starts a guest with a cache of its own; gives its counters."""

    def once(number: int = 0) -> dict[str, int]:
        report = tmp_path / f"report{number}"
        done = cli(
            *("run", "--accel", "dbt", "--report", str(report), "--", "sh", "-c", "exit 7"),
            env={"XDG_CACHE_HOME": str(tmp_path / "cache")},
        )
        assert done.returncode == 7, done.stderr
        counters: dict[str, int] = json.loads(report.read_text())["counters"]
        return counters

    return once


def kept(tmp_path: Path) -> Path:
    """The file; the VMM writes it when the front has gone already."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for path in (tmp_path / "cache" / KERNELS).glob("*/translations"):
            return path
        time.sleep(0.02)
    raise AssertionError("no translations were kept")


def test_translations_second_start_revives_them(start: Start, tmp_path: Path) -> None:
    first = start()
    kept(tmp_path)
    second = start()
    assert first["revived_blocks"] == 0
    assert second["revived_blocks"] > 0.8 * second["translated_blocks"]
    assert kept(tmp_path).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["byte", "truncated", "writable", "empty", "other"])
def test_translations_unfit_file_is_not_believed(start: Start, tmp_path: Path, damage: str) -> None:
    start()
    path = kept(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "byte":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        content[8] ^= 1  # the key: another program, another CPU
        path.write_bytes(content)
    else:
        path.chmod(0o666)
    assert start()["revived_blocks"] == 0


def test_translations_many_guests_at_once_leave_one_good_file(start: Start, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(start, range(4)))
    folder = kept(tmp_path).parent
    assert start()["revived_blocks"] > 0
    deadline = time.monotonic() + 20
    while any(name.endswith(".new") for name in os.listdir(folder)):
        assert time.monotonic() < deadline, os.listdir(folder)
        time.sleep(0.02)
