"""``microvm run``: one command in a fresh guest."""

from __future__ import annotations

from microvm.cli import guest
from microvm.cli.options import Help, UsageError, describe, parse

_HELP = f"""\
Boots a guest, runs one command in it, and ends with the command's exit status.

usage: microvm run [OPTIONS] -- CMD [ARGS...]

{describe(guest.OPTIONS)}

On a terminal the command gets one, and Ctrl-] ends the session. Otherwise stdin, stdout and stderr
are passed through as they are, binary-clean and apart. Ctrl-C interrupts the command, a second
one ends the guest. Nothing of your environment gets in unless -e asks for it.

  microvm run -- uname -a
  echo hi | microvm run -- wc -c
  microvm run -m 1G -u nobody -w /tmp -e LANG=C -- sh -c 'id; pwd'
  microvm run --timeout 30s -- sh -c 'while :; do :; done'; echo $?   124: too late
  microvm run --kernel ./vmlinux --console -- dmesg      boot a kernel just built
  microvm run --report boot.json -q -- true              how long did what take
"""


def main(argv: list[str]) -> int:
    """Runs the verb; the exit code."""
    try:
        parsed = parse(argv, guest.OPTIONS)
    except Help:
        raise Help(_HELP) from None
    if not parsed.operands:
        raise UsageError("run needs a command: microvm run -- CMD ARGS")
    return guest.main(parsed, parsed.operands)
