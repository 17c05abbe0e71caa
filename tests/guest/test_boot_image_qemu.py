"""A boot image on a machine that is not ours: QEMU, with a firmware that only enters it.

What our VMM would map and what its first registers would be are given to QEMU instead, so a fault
of the boot path is told from one of the vCPU. Kernels are those of the store; with none, or
without QEMU, there is nothing to test.

    pytest tests/guest/test_boot_image_qemu.py
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from microvm.boot.image import BootImage, build_boot_image
from microvm.boot.kernel import load_kernel
from microvm.images import cpio
from microvm.images.kernels import BUILT, PULLED, StoredKernel, list_kernels

LIB = Path(__file__).resolve().parents[1] / "lib"
QEMU = "qemu-system-x86_64"

# A PID 1 that says HELLO and restarts the machine.
INIT = """
    .globl _start
_start:
    movl $1, %eax           # write
    movl $1, %edi
    leaq text(%rip), %rsi
    movl $6, %edx
    syscall
    movl $169, %eax         # reboot
    movl $0xfee1dead, %edi
    movl $672274793, %esi
    movl $0x1234567, %edx   # LINUX_REBOOT_CMD_RESTART
    syscall
text: .ascii "HELLO\\n"
"""

pytestmark = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in (QEMU, "as", "ld")), reason="QEMU is not installed"
)


def newest(origin: str) -> StoredKernel:
    for kernel in list_kernels():
        if kernel.origin == origin:
            return kernel
    pytest.skip(f"no kernel of origin {origin} in the store: microvm kernel ls")


@pytest.fixture
def initrd(tmp_path: Path) -> Path:
    (tmp_path / "init.s").write_text(INIT)
    subprocess.run(["as", "-o", tmp_path / "init.o", tmp_path / "init.s"], check=True)
    subprocess.run(["ld", "-s", "-o", tmp_path / "init", tmp_path / "init.o"], check=True)
    init = (tmp_path / "init").read_bytes()
    (tmp_path / "initrd").write_bytes(cpio.pack([cpio.regular("init", init, 0o755)]))
    return tmp_path / "initrd"


def firmware(image: BootImage, folder: Path) -> Path:
    values = {
        "CR3": image.cr3,
        "GDT": image.gdt,
        "RIP": image.rip,
        "RSI": image.rsi,
        "RSP": image.rsp,
    }
    symbols = [f"--defsym={name}={value}" for name, value in values.items()]
    source = LIB / "enter_kernel.S"
    subprocess.run(["as", *symbols, "-o", folder / "fw.o", source], check=True)
    subprocess.run(
        ["ld", "-Ttext=0", "--oformat=binary", "-e", "0", "-o", folder / "fw", folder / "fw.o"],
        check=True,
    )
    return folder / "fw"


def run(image: BootImage, memory: int, cpus: int, folder: Path) -> str:
    """The console of a run that ends when the guest restarts."""
    pieces = list(image.data)
    for file in image.files:
        with open(file.path, "rb") as stream:
            stream.seek(file.offset)
            pieces.append((file.gpa, stream.read(file.length)))
    command = [QEMU, "-M", "microvm,acpi=off", "-accel", "tcg,thread=single", "-cpu", "max"]
    command += ["-m", f"{memory >> 20}", "-smp", str(cpus), "-bios", str(firmware(image, folder))]
    command += ["-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"]
    for number, (gpa, data) in enumerate(pieces):
        path = folder / f"piece{number}"
        path.write_bytes(data)
        command += ["-device", f"loader,file={path},addr={gpa:#x},force-raw=on"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    return (done.stdout + done.stderr).decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("origin", [BUILT, PULLED])
@pytest.mark.parametrize(("memory", "cpus"), [(128 << 20, 1), (3200 << 20, 2)])
def test_boot_image_on_qemu_reaches_init(
    tmp_path: Path, initrd: Path, origin: str, memory: int, cpus: int
) -> None:
    kernel = load_kernel(newest(origin).path)
    # QEMU's CPU has no paravirtual clock: the kernel is told what it would calibrate. Restart by
    # triple fault, for want of a keyboard controller.
    extra = "tsc_early_khz=1000000 lpj=4000000 no_timer_check reboot=t"
    image = build_boot_image(kernel, memory=memory, cpus=cpus, initrds=[str(initrd)], extra=extra)
    console = run(image, memory, cpus, tmp_path)
    assert "HELLO" in console, console[-3000:]
