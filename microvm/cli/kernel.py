"""``microvm kernel``: the kernels that guests can have."""

from __future__ import annotations

import os
import sys

from microvm.cli import say
from microvm.cli.options import Help, Option, UsageError, describe, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from microvm.cli.options import Parsed
    from microvm.images.kernels import StoredKernel

_QUIET = Option(names=("-q", "--quiet"), help="no progress, no notes")
_OPTIONS = (
    _QUIET,
    Option(names=("--name",), metavar="NAME", help="import: what to call it (its version)"),
    Option(
        names=("--modules",), metavar="DIR", help="import: its modules, as /lib/modules/VERSION"
    ),
)

_HELP = f"""\
The kernels that guests can have. Without --kernel a guest gets the first of the list: a kernel
that was built here, else one that was pulled, else the host's own.

usage: microvm kernel ls                * marks the one that guests get by default
       microvm kernel pull [VERSION]    the distribution's stock kernel, in seconds; no root
       microvm kernel build             our tuned one, in minutes; boots faster; no root
       microvm kernel import FILE       any vmlinux or bzImage, under a name
       microvm kernel rm NAME...

{describe(_OPTIONS)}

  microvm kernel pull                   the newest cloud kernel
  microvm kernel pull 6.1               the newest that begins with 6.1
  microvm kernel import --name mine ./vmlinux && microvm run --kernel mine -- uname -r
"""


def main(argv: list[str]) -> int:
    """Runs the verb; the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        raise Help(_HELP)
    action = _ACTIONS.get(argv[0])
    if action is None:
        raise UsageError(f"no verb kernel {argv[0]!r}: {', '.join(_ACTIONS)}, or --help")
    try:
        parsed = parse(argv[1:], _OPTIONS)
    except Help:
        raise Help(_HELP) from None
    return action(parsed)


def _operands(parsed: Parsed, verb: str, least: int, most: int) -> list[str]:
    if not least <= len(parsed.operands) <= most:
        wanted = {0: "no operands", 1: "one operand"}.get(most, "at least one operand")
        raise UsageError(f"kernel {verb} takes {wanted}; see microvm kernel --help")
    return parsed.operands


def _note(parsed: Parsed, what: str, kernel: StoredKernel) -> int:
    if not parsed.flag("quiet"):
        say(f"{what} {kernel.name} ({kernel.path})")
    return 0


def _ls(parsed: Parsed) -> int:
    from microvm.images.kernels import list_kernels

    _operands(parsed, "ls", 0, 0)
    kernels = list_kernels()
    width = max((len(kernel.name) for kernel in kernels), default=0)
    for kernel in kernels:
        mark = "*" if kernel.is_default else " "
        size = os.stat(kernel.path).st_size / (1 << 20)
        say(f"{mark} {kernel.name:<{width}}  {kernel.origin:<8} {size:6.1f} MiB  {kernel.path}")
    if not kernels and not parsed.flag("quiet"):
        sys.stderr.write("no kernels yet: microvm kernel pull\n")
    return 0


def _pull(parsed: Parsed) -> int:
    from microvm.cli.progress import Bar
    from microvm.images.pull import pull_kernel

    version = next(iter(_operands(parsed, "pull", 0, 1)), None)
    with Bar(quiet=parsed.flag("quiet")) as bar:
        kernel = pull_kernel(version, bar)
    return _note(parsed, "pulled", kernel)


def _build(parsed: Parsed) -> int:
    from microvm.cli.progress import Bar
    from microvm.images.build import build_kernel

    _operands(parsed, "build", 0, 0)
    with Bar(quiet=parsed.flag("quiet")) as bar:
        kernel = build_kernel(bar)
    return _note(parsed, "built", kernel)


def _import(parsed: Parsed) -> int:
    from microvm.images.kernels import import_kernel

    (path,) = _operands(parsed, "import", 1, 1)
    kernel = import_kernel(path, parsed.text("name"), parsed.text("modules"))
    return _note(parsed, "imported", kernel)


def _rm(parsed: Parsed) -> int:
    from microvm.images.kernels import remove_kernel

    for name in _operands(parsed, "rm", 1, 1000):
        _note(parsed, "removed", remove_kernel(name))
    return 0


_ACTIONS: dict[str, Callable[[Parsed], int]] = {
    "ls": _ls,
    "pull": _pull,
    "build": _build,
    "import": _import,
    "rm": _rm,
}
