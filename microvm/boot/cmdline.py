"""The kernel's command line: what we say by default, and why."""

from __future__ import annotations

from microvm import layout
from microvm.boot import kernel as features
from microvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from microvm.boot.kernel import Kernel

#: COMMAND_LINE_SIZE of x86: the kernel cuts what is longer, silently. In bytes, with its NUL.
COMMAND_LINE_SIZE = 2048

_EVERY = (
    "console=ttyS0",  # messages and panics through the simplest device there is
    "panic=-1",  # a panic restarts at once, which ends the guest; nobody is there to read it
    "reboot=k",  # by the keyboard controller's port: a triple fault then always means a fault
    "tsc=reliable",  # it is the host's: no watchdog timer compares clocks
    "noreplace-smp",  # one CPU: 7,000 LOCK prefixes stay; patching them costs 5 M instructions
    "norandmaps",  # equal addresses from run to run: counts compare, predicted targets hold
    "rcupdate.rcu_expedited=1",  # unmounting, namespaces: no waiting for ticks on few, idle CPUs
)
_TUNED = ("dummy.numdummies=0",)  # no dummy0, and none of its 70 files in /sys
_STOCK = (
    "pci=off",  # there is no bus: do not probe for one
    "8250.nr_uarts=1",  # three absent ports cost 300 exits
    "init_on_alloc=0",  # zeroes each allocation against bugs in drivers; pages come zeroed anyway
    "randomize_kstack_offset=off",  # RDTSC in each system call
    "nowatchdog",  # lock-up detectors: a timer each, and an idle guest should sleep
    "cryptomgr.notests",  # self-tests of algorithms
    "apparmor=0",  # no policy is ever loaded, its hooks cost all the same
    "audit=0",  # nobody reads it
)
#: Initialisation that a guest does not miss, by the name of its function; a name that a kernel
#: lacks is ignored. Together they are half of a stock kernel's boot.
_SKIP_EVERY = (
    "slab_late_init",  # 2,500 files in /sys/kernel/slab: 3 M instructions
    "slab_sysfs_init",  # the same before Linux 6.9
)
_SKIP_STOCK = (
    "pci_arch_init",  # finds no bus and says "Fatal", the one line of a quiet boot
    "jent_mod_init",  # tests an entropy source that nobody asks: 130 M instructions
    "trace_eval_init",  # names of constants in ftrace's formats: 90 M
    "ftrace_check_for_weak_functions",  # looks up 50,000 names for ftrace: 90 M
    "load_system_certificate_list",  # keys of module signatures, which ours do not carry: 40 M
)
_MITIGATED = "mitigations=off"  # side channels are out of the threat model; retpolines cost 5 %


def default_cmdline(kernel: Kernel, *, virtio: int, verbose: bool = False) -> str:
    """The command line for a kernel with ``virtio`` devices, ``verbose``: with boot messages."""
    words = list(_EVERY)
    skipped = _SKIP_EVERY if kernel.is_tuned else (*_SKIP_EVERY, *_SKIP_STOCK)
    words.append("initcall_blacklist=" + ",".join(skipped))
    if not verbose:
        words.append("quiet")  # each byte of a message is an exit
    if not kernel.features & features.NO_MITIGATIONS:
        words.append(_MITIGATED)
    if kernel.is_tuned:
        if kernel.features & features.ACPI:
            words.append("acpi=off")  # it could, but the MP table is less
        words += _TUNED
        words += (_mmio_word(index) for index in range(virtio))
    else:
        words += _STOCK
    return " ".join(words)


def _mmio_word(index: int) -> str:
    gpa = layout.VIRTIO_MMIO_GPA + index * layout.VIRTIO_MMIO_STRIDE
    return f"virtio_mmio.device=4K@{gpa:#x}:{layout.GSI_VIRTIO + index}"


def encode(cmdline: str) -> bytes:
    """The bytes for CMDLINE_GPA, with a NUL. Raises ``ConfigError``."""
    try:
        data = cmdline.encode("ascii", "surrogateescape") + b"\0"
    except UnicodeEncodeError:
        data = cmdline.encode("utf-8", "surrogateescape") + b"\0"
    if len(data) > COMMAND_LINE_SIZE:
        raise ConfigError(
            f"kernel command line is {len(data) - 1} bytes: at most {COMMAND_LINE_SIZE - 1} fit"
        )
    if b"\0" in data[:-1] or b"\n" in data:
        raise ConfigError("kernel command line contains a NUL or a line end")
    return data
