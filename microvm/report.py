"""The report of a machine: what was chosen and why, how long what took, how it ended.

All of it can be written as JSON. Times are ns since the machine's epoch, which for the ``microvm``
command is the start of its process:

``process``     0
``vcpu_entry``  the vCPUs begin
``kernel``      the guest kernel's clock begins
``init``        first instruction of the guest's init
``agent``       the guest can be given commands
``command``     the first command is about to run
``exit``        the guest is over
"""

from __future__ import annotations

from microvm import control, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

POINTS = ("process", "vcpu_entry", "kernel", "init", "agent", "command", "exit")

_GUEST_POINTS = {
    layout.EVENT_INIT: "init",
    layout.EVENT_AGENT: "agent",
    layout.EVENT_COMMAND: "command",
}

REASONS = {
    control.POWEROFF: "poweroff",
    control.REBOOT: "reboot",
    control.PANIC: "panic",
    control.SHUTDOWN: "triple fault",
    control.DEBUG_EXIT: "debug exit",
    control.HALTED: "halted",
    control.STOPPED: "stopped",
    control.BACKEND: "backend",
    control.SETUP: "setup",
}


class Timeline:
    """When what happened, in ns since ``epoch`` (CLOCK_MONOTONIC ns)."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._points = {"process": 0}

    def add(self, event: control.Event) -> None:
        """Takes the time of an event of the VMM, if it has one of interest."""
        if event.kind == control.STARTED:
            self._set("vcpu_entry", event.time)
        elif event.kind == control.EXIT:
            self._set("exit", event.time)
        elif event.kind == control.GUEST and event.code in _GUEST_POINTS:
            self._set(_GUEST_POINTS[event.code], event.time)
            if event.code == layout.EVENT_INIT and event.value:
                self._set("kernel", event.time - event.value * layout.EVENT_UPTIME_UNIT)

    def _set(self, point: str, time: int) -> None:
        self._points.setdefault(point, time - self._epoch)

    def points(self) -> dict[str, int]:
        """What has happened so far, in order."""
        return {name: self._points[name] for name in POINTS if name in self._points}


def exits(stats: Mapping[str, int]) -> dict[str, int]:
    """Exits by kind, only those that happened."""
    return {kind: stats[kind] for kind in control.EXIT_KINDS if stats.get(kind)}


def counters(stats: Mapping[str, int]) -> dict[str, int]:
    """Everything else that the vCPUs counted."""
    return {name: stats.get(name, 0) for name in control.COUNTERS}


def to_json(report: Mapping[str, object]) -> bytes:
    """The report as a JSON text."""
    import json

    return json.dumps(report, indent=2).encode() + b"\n"
