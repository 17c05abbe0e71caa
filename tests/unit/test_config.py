"""Options are checked before anything starts."""

from __future__ import annotations

import pytest

from microvm.config import MachineConfig, machine_config, parse_duration, parse_size
from microvm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256M", 256 << 20),
        ("1.5G", 3 << 29),
        ("2GiB", 2 << 30),
        ("65536k", 64 << 20),
        ("128 MB", 128 << 20),
        ("67108864", 64 << 20),
        (4096, 4096),
    ],
)
def test_parse_size_units_are_powers_of_1024(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "12X", "1.2.3M", "-", "1e400G", "nanM", "infG"])
def test_parse_size_nonsense_raises(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_size(text, "--memory")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("500ms", 0.5), ("2m", 120), ("1h", 3600), ("7", 7), (1.5, 1.5)],
)
def test_parse_duration_gives_seconds(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1s", "5 parsecs", "inf", "nan", "s"])
def test_parse_duration_nonsense_raises(text: str) -> None:
    with pytest.raises(ConfigError, match="--timeout"):
        parse_duration(text, "--timeout")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "1M"}, "64 MiB"),
        ({"memory": "99999G"}, "TiB"),
        ({"memory": (64 << 20) + 1}, "4096"),
        ({"cpus": 0}, "CPUs"),
        ({"cpus": 1000}, "CPUs"),
        ({"accel": "tcg"}, "auto, kvm, dbt"),
        ({"cmdline": "a\nb"}, "one line"),
        ({"cmdline": "x" * 5000}, "longer"),
        ({"boot_timeout": 0}, "more than 0"),
    ],
)
def test_machine_config_out_of_range_raises(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        machine_config(**options)  # type: ignore[arg-type]


def test_machine_config_odd_size_is_rounded_down_to_a_page() -> None:
    assert machine_config(memory="100.0001M").memory % 4096 == 0


def test_machine_config_default_is_valid() -> None:
    assert MachineConfig().memory == 256 << 20
