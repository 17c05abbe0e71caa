"""What a machine is to be: parsed and checked before anything is started.

Everything that a user can get wrong in an option ends here as a :class:`ConfigError` that names
the option, what is wrong with it and what would be right.
"""

from __future__ import annotations

from microvm._record import Record
from microvm.errors import ConfigError
from microvm.layout import CMDLINE_MAX, RAM_MAX, RAM_MIN, VCPUS_MAX

ACCELS = ("auto", "kvm", "dbt")
DEFAULT_MEMORY = 256 << 20
PAGE = 4096

_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_TIME_UNITS = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "min": 60.0, "h": 3600.0}


def _split(text: str) -> tuple[str, str]:
    """Number and unit: "256M" -> ("256", "m"), "1.5GiB" -> ("1.5", "g")."""
    number = text.strip().lower()
    unit = ""
    while number and not (number[-1].isdigit() or number[-1] == "."):
        unit = number[-1] + unit
        number = number[:-1]
    return number.strip(), unit.strip()


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes of "256M", "1.5G", "65536k" or a number of bytes; units are powers of 1024.

    Raises ``ConfigError`` that calls the value ``what``.
    """
    if isinstance(text, int):
        return text
    number, unit = _split(text)
    unit = unit.removesuffix("ib").removesuffix("b")
    try:
        return int(float(number) * _SIZE_UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{what} {text!r} is not a size: write 512M or 2G") from None


def parse_duration(text: str | float, what: str = "time") -> float:
    """Seconds of "30s", "500ms", "2m", "1h" or a number of seconds; more than 0.

    Raises ``ConfigError`` that calls the value ``what``.
    """
    try:
        if isinstance(text, str):
            number, unit = _split(text)
            seconds = float(number) * _TIME_UNITS[unit]
        else:
            seconds = float(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{what} {text!r} is not a time: write 30s, 500ms or 2m") from None
    if not 0 < seconds < 1e9:
        raise ConfigError(f"{what} {text!r} must be more than 0")
    return seconds


class MachineConfig(Record):
    """One machine. Fields are checked here; files are opened when the machine starts.

    ``memory``: bytes, a multiple of 4096. ``cpus``: vCPUs. ``accel``: "auto", "kvm" or "dbt".
    ``kernel``: path of a vmlinux or bzImage, name of a kernel that ``microvm kernel ls`` shows,
    or None for the best there is. ``initrd``: path of an initramfs to use instead of ours, or
    None. ``cmdline``: words to append to the kernel's command line. ``root``: path of a raw ext4
    image to use as the root file system, or None; ``root_readonly``: it is not written to.
    ``boot_timeout``: seconds until the guest must answer, or None. ``count``: count guest
    instructions. ``console_fd``: descriptor to which console output is copied as it comes, or
    None.
    """

    memory: int = DEFAULT_MEMORY
    cpus: int = 1
    accel: str = "auto"
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str = ""
    root: str | None = None
    root_readonly: bool = False
    boot_timeout: float | None = None
    count: bool = False
    console_fd: int | None = None

    def __post_init__(self) -> None:
        if not RAM_MIN <= self.memory <= RAM_MAX:
            raise ConfigError(
                f"memory of {self.memory >> 20} MiB is out of range: "
                f"{RAM_MIN >> 20} MiB to {RAM_MAX >> 40} TiB are possible"
            )
        if self.memory % PAGE:
            raise ConfigError(f"memory of {self.memory} bytes is not a multiple of {PAGE}")
        if not 1 <= self.cpus <= VCPUS_MAX:
            raise ConfigError(f"{self.cpus} CPUs are out of range: 1 to {VCPUS_MAX} are possible")
        if self.accel not in ACCELS:
            raise ConfigError(f"accel {self.accel!r} is not known: {', '.join(ACCELS)} are")
        if "\n" in self.cmdline or "\0" in self.cmdline:
            raise ConfigError("cmdline must be one line")
        if len(self.cmdline.encode()) >= CMDLINE_MAX:
            raise ConfigError(f"cmdline is longer than {CMDLINE_MAX - 1} bytes")


def machine_config(
    *,
    memory: int | str = DEFAULT_MEMORY,
    cpus: int = 1,
    accel: str = "auto",
    kernel: str | None = None,
    initrd: str | None = None,
    cmdline: str = "",
    root: str | None = None,
    root_readonly: bool = False,
    boot_timeout: float | str | None = None,
    count: bool = False,
    console_fd: int | None = None,
) -> MachineConfig:
    """A :class:`MachineConfig` from values as people write them ("256M", "30s")."""
    size = parse_size(memory, "memory")
    return MachineConfig(
        memory=size - size % PAGE if isinstance(memory, str) else size,
        cpus=cpus,
        accel=accel,
        kernel=kernel,
        initrd=initrd,
        cmdline=cmdline,
        root=root,
        root_readonly=root_readonly,
        boot_timeout=None if boot_timeout is None else parse_duration(boot_timeout, "timeout"),
        count=count,
        console_fd=console_fd,
    )
