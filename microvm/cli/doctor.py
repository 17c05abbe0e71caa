"""``microvm doctor``: what this machine offers, and what would be used."""

from __future__ import annotations

from microvm.cli import EXIT_FAILURE, say
from microvm.cli.options import Help, Option, UsageError, describe, parse
from microvm.doctor import Finding, examine

_OPTIONS = (
    Option(names=("--format",), metavar="FORMAT", help="text or json (name, state, found, advice)"),
)

_HELP = f"""\
Looks at this machine: what it offers, what would be used, why, and what you can do.
Exit code 0: guests run here; 125: something that they need is missing.

usage: microvm doctor [--format json]

{describe(_OPTIONS)}

  microvm doctor
  microvm doctor --format json | jq -r '.[] | select(.state == "bad").advice'
"""

_MARKS = {"ok": "ok", "note": "note", "bad": "BAD"}


def main(argv: list[str]) -> int:
    """Runs the verb; the exit code."""
    try:
        parsed = parse(argv, _OPTIONS)
    except Help:
        raise Help(_HELP) from None
    style = parsed.text("format") or "text"
    if parsed.operands or style not in ("text", "json"):
        raise UsageError("doctor takes --format text or json, and nothing else")
    findings = examine()
    say(_as_json(findings) if style == "json" else _as_text(findings))
    return EXIT_FAILURE if any(finding.state == "bad" for finding in findings) else 0


def _as_text(findings: list[Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.state]:<5} {finding.name:<11} {finding.found}")
        if finding.advice:
            lines.append(f"{'':<17} {finding.advice}")
    return "\n".join(lines)


def _as_json(findings: list[Finding]) -> str:
    import json

    fields = ("name", "state", "found", "advice")
    return json.dumps([{field: getattr(f, field) for field in fields} for f in findings], indent=2)
