"""Linux in a micro-VM, at once: no daemon, no root, no ``/dev/kvm`` needed.

>>> import microvm
>>> microvm.run(["uname", "-s"], capture_output=True).stdout
b'Linux\\n'
>>> with microvm.Machine(memory="256M") as vm:
...     vm.run(["true"]).returncode
0

``Machine`` and ``run`` start guests; errors are one tree under ``MicrovmError``. Names are loaded
when they are first used: importing this package costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from microvm.command import Command, Completed
    from microvm.config import MachineConfig
    from microvm.errors import (
        AccelError,
        CommandError,
        ConfigError,
        GuestError,
        GuestGoneError,
        HostError,
        MicrovmError,
        PanicError,
        TimeoutError,
        TripleFaultError,
        VmmKilledError,
    )
    from microvm.machine import Machine, run

__version__ = "0.1.0"

__all__ = [
    "AccelError",
    "Command",
    "CommandError",
    "Completed",
    "ConfigError",
    "GuestError",
    "GuestGoneError",
    "HostError",
    "Machine",
    "MachineConfig",
    "MicrovmError",
    "PanicError",
    "TimeoutError",
    "TripleFaultError",
    "VmmKilledError",
    "__version__",
    "run",
]

_ELSEWHERE = {
    "Command": "command",
    "Completed": "command",
    "Machine": "machine",
    "MachineConfig": "config",
    "run": "machine",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'microvm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"microvm.{_ELSEWHERE.get(name, 'errors')}"), name)
