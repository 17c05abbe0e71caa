"""Command-line options: one table row an option; parsing and ``--help`` come from the rows.

Options of a verb come before its operands, in any order, as ``-m 512M``, ``-m512M``,
``--memory 512M`` or ``--memory=512M``; flags may be joined (``-qc2``). ``--`` ends them. Not
``argparse``: importing it and building a parser takes as long as starting Python itself, on the
way to every guest.
"""

from __future__ import annotations

from microvm._record import Record
from microvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class UsageError(ConfigError):
    """The command line makes no sense."""


class Help(Exception):
    """``--help`` was asked for."""


class Option(Record):
    """One option. ``names``: "-m", "--memory". ``metavar``: "" makes it a flag.

    ``convert`` turns the argument into a value and raises ``ConfigError``. ``repeats``: the values
    are collected in a list.
    """

    names: tuple[str, ...]
    help: str
    metavar: str = ""
    convert: Callable[[str], object] = str
    repeats: bool = False

    @property
    def key(self) -> str:
        """Its name in the result: "--boot-timeout" is "boot_timeout"."""
        return self.names[-1].lstrip("-").replace("-", "_")


class Parsed(Record):
    """What a command line said. ``values``: only options that were given."""

    values: dict[str, object]
    operands: list[str]
    dashes: bool  #: whether "--" stood before the operands

    def text(self, key: str) -> str | None:
        """The value of an option that converts to ``str``."""
        value = self.values.get(key)
        return value if isinstance(value, str) else None

    def flag(self, key: str) -> bool:
        """Whether a flag was given."""
        return bool(self.values.get(key))


def whole_number(name: str) -> Callable[[str], int]:
    """A converter to ``int`` whose error names the option."""

    def convert(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise UsageError(f"{name} {text!r} is not a number")
        return int(text)

    return convert


def parse(argv: Sequence[str], options: Sequence[Option]) -> Parsed:
    """Parses up to the first operand or ``--``; the rest is verbatim.

    Raises ``UsageError``, and ``Help`` for -h and --help.
    """
    table = {name: option for option in options for name in option.names}
    values: dict[str, object] = {}
    rest = list(argv)
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
        word = rest.pop(0)
        if word in ("-h", "--help"):
            raise Help
        name, argument = _split(word)
        option = table.get(name)
        if option is None:
            raise UsageError(_unknown(name, table))
        if not option.metavar:
            if argument is not None and word.startswith("--"):
                raise UsageError(f"{name} takes no value")
            if argument is not None:
                rest.insert(0, f"-{argument}")
            values[option.key] = True
            continue
        if argument is None:
            if not rest:
                raise UsageError(f"{name} needs a value: {name} {option.metavar}")
            argument = rest.pop(0)
        _store(values, option, argument)
    dashes = bool(rest) and rest[0] == "--"
    return Parsed(values=values, operands=rest[1:] if dashes else rest, dashes=dashes)


def _split(word: str) -> tuple[str, str | None]:
    """Name and joined argument: "--a=b" -> ("--a", "b"), "-m1G" -> ("-m", "1G")."""
    if word.startswith("--"):
        name, equals, argument = word.partition("=")
        return name, argument if equals else None
    return word[:2], word[2:] or None


def _store(values: dict[str, object], option: Option, argument: str) -> None:
    value = option.convert(argument)
    if option.repeats:
        given = values.setdefault(option.key, [])
        assert isinstance(given, list)
        given.append(value)
    else:
        values[option.key] = value


def _unknown(name: str, table: dict[str, Option]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, table, 1)
    return f"no option {name}" + (f"; did you mean {close[0]}?" if close else "; see --help")


def describe(options: Sequence[Option]) -> str:
    """The options as lines of a help text."""
    lines = []
    for option in options:
        left = "  " + ", ".join(option.names) + (f" {option.metavar}" if option.metavar else "")
        lines.append(
            f"{left:<26}  {option.help}" if len(left) < 27 else f"{left}\n{'':28}{option.help}"
        )
    return "\n".join(lines)
