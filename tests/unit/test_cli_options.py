"""Command lines: parsed, explained, refused."""

from __future__ import annotations

import pytest

from microvm.cli import guest
from microvm.cli.options import Help, Option, UsageError, describe, parse, whole_number
from microvm.errors import ConfigError

OPTIONS = (
    Option(names=("-m", "--memory"), metavar="SIZE", help="RAM"),
    Option(names=("-c", "--cpus"), metavar="N", convert=whole_number("--cpus"), help="CPUs"),
    Option(names=("-e", "--env"), metavar="K=V", repeats=True, help="environment"),
    Option(names=("-q", "--quiet"), help="less"),
    Option(names=("--dry-run",), help="nothing"),
)


@pytest.mark.parametrize(
    "argv", [["-m", "1G"], ["-m1G"], ["--memory", "1G"], ["--memory=1G"], ["-qm1G"]]
)
def test_parse_value_is_taken_in_every_spelling(argv: list[str]) -> None:
    assert parse(argv, OPTIONS).text("memory") == "1G"


def test_parse_joined_flags_are_split() -> None:
    parsed = parse(["-qc2"], OPTIONS)
    assert parsed.flag("quiet")
    assert parsed.values["cpus"] == 2


def test_parse_repeated_option_is_collected() -> None:
    assert parse(["-e", "A=1", "--env=B=2"], OPTIONS).values["env"] == ["A=1", "B=2"]


@pytest.mark.parametrize("argv", [["-q", "--", "ls", "-q", "--"], ["-q", "ls", "-q", "--"]])
def test_parse_operands_are_verbatim(argv: list[str]) -> None:
    assert parse(argv, OPTIONS).operands == ["ls", "-q", "--"]


def test_parse_dash_alone_is_an_operand() -> None:
    assert parse(["-"], OPTIONS).operands == ["-"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--memry", "1G"], "did you mean --memory"),
        (["-z"], "no option -z"),
        (["-m"], "needs a value: -m SIZE"),
        (["--quiet=yes"], "takes no value"),
        (["-c", "two"], "--cpus 'two' is not a number"),
        (["-c", "²"], "not a number"),
    ],
)
def test_parse_nonsense_raises_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(argv, OPTIONS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_parse_help_raises_help_before_operands_only(word: str) -> None:
    with pytest.raises(Help):
        parse(["-q", word], OPTIONS)
    assert parse(["ls", word], OPTIONS).operands == ["ls", word]


def test_describe_names_every_option() -> None:
    text = describe(guest.OPTIONS)
    for option in guest.OPTIONS:
        assert all(name in text for name in option.names)


def test_guest_options_convert_values() -> None:
    parsed = parse(["-m", "1G", "--timeout", "2m", "-e", "A=b=c"], guest.OPTIONS)
    assert parsed.values == {"memory": 1 << 30, "timeout": 120.0, "env": [("A", "b=c")]}


@pytest.mark.parametrize("argv", [["-e", "A"], ["-e", "=x"], ["--accel", "tcg"], ["-m", "x"]])
def test_guest_options_bad_value_raises(argv: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse(argv, guest.OPTIONS)
