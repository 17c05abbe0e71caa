"""``microvm shell``: a Linux shell in a fresh guest."""

from __future__ import annotations

from microvm.cli import guest
from microvm.cli.options import Help, UsageError, describe, parse
from microvm.machine import LOGIN_SHELL

_HELP = f"""\
Boots a guest and gives you its shell. Ctrl-] ends the session, and the guest with it.

usage: microvm shell [OPTIONS]

{describe(guest.OPTIONS)}

  microvm shell
  microvm shell -m 1G --root debian.ext4
  echo 'uname -a' | microvm shell                        no terminal: commands from a pipe
"""


def main(argv: list[str]) -> int:
    """Runs the verb; the exit code."""
    try:
        parsed = parse(argv, guest.OPTIONS)
    except Help:
        raise Help(_HELP) from None
    if parsed.operands:
        raise UsageError("shell takes no command: microvm run -- CMD ARGS runs one")
    return guest.main(parsed, list(LOGIN_SHELL))
