"""The peer: QEMU's TCG, as fast as it can be set up.

Its smallest machine, without firmware options, clock or any device but a serial port and a port
that ends it. The kernel is entered through QEMU's own small firmware (qboot), which costs a few
ms; that is what ``-M microvm`` is.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from common.host import find_tool

PROGRAM = "qemu-system-x86_64"
PACKAGE = "qemu-system-x86"
MACHINE = "microvm,acpi=off,rtc=off,x-option-roms=off"
#: Words for a kernel that cannot calibrate its timers on this machine, and would wait in trying.
NO_CALIBRATION = "lpj=1000000 nolapic_timer"
_OUR_WORDS = ("virtio_mmio.device=",)  # devices that are not there


def find() -> str:
    """Path of QEMU. Raises ``BenchError``."""
    return find_tool(PROGRAM, PACKAGE)


def version() -> str:
    """QEMU's own line about its version."""
    done = subprocess.run([find(), "--version"], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[0]


def argv(kernel: Path, initrd: Path, cmdline: str, *, memory_mib: int) -> list[str]:
    """The command line of a guest whose first serial port is our stdin and stdout."""
    machine = ["-M", MACHINE, "-accel", "tcg", "-cpu", "max", "-m", str(memory_mib)]
    nothing = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    devices = ["-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    guest = ["-kernel", str(kernel), "-initrd", str(initrd), "-append", cmdline]
    return [find(), *machine, *nothing, *devices, *guest]


def exit_status(returncode: int) -> int:
    """The status that the guest wrote to the debug exit port; negative if it wrote none."""
    return returncode >> 1 if returncode > 0 and returncode & 1 else -1


def command_line(ours: str, *words: str) -> str:
    """Our guest's command line for a machine without our devices, and more words."""
    kept = [word for word in ours.split() if not word.startswith(_OUR_WORDS)]
    return " ".join([*kept, *words])
