"""Bare payloads on the real VMM and both backends: how a guest's end is told.

Rerun one: .venv/bin/python -m pytest tests/guest/test_payload.py -k X
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from microvm import errors, layout, plan
from microvm.machine import Machine

# mov dx, 0x3f8; then for each letter: mov al, letter; out dx, al
SERIAL = b"\x66\xba" + layout.PORT_SERIAL.to_bytes(2, "little")


def write(text: bytes) -> bytes:
    """Code that writes `text` to the serial port."""
    return SERIAL + b"".join(b"\xb0" + bytes([letter]) + b"\xee" for letter in text)


def event(code: int, value: int = 0) -> bytes:
    """Code that tells the VMM where the guest is: mov dx, port; mov eax, event; out dx, eax."""
    word = (code | value << 8).to_bytes(4, "little")
    return b"\x66\xba" + layout.PORT_EVENT.to_bytes(2, "little") + b"\xb8" + word + b"\xef"


SPIN = b"\xeb\xfe"  # jmp .
DEBUG_EXIT_3 = b"\xb0\x03\xe6\xf4"  # mov al, 3; out 0xf4, al: status 7
TRIPLE_FAULT = b"\x0f\x0b"  # ud2 without an IDT
RESET = b"\xb0\xfe\xe6\x64"  # mov al, 0xfe; out 0x64, al
HALT = b"\xf4\xeb\xfd"  # hlt, interrupts off


@pytest.fixture
def options(accel: str, no_initrd: Path) -> dict[str, object]:
    """Options for a machine on the backend of this test."""
    return {"accel": accel, "initrd": str(no_initrd), "memory": "64M"}


def fail_to_start(payload, code: bytes, options: dict[str, object]) -> errors.MicrovmError:
    machine = Machine(kernel=str(payload(code)), **options)
    with pytest.raises(errors.MicrovmError) as caught:
        machine.start()
    assert machine.pid is None
    return caught.value


def test_debug_exit_gives_its_status(payload, options) -> None:
    error = fail_to_start(payload, write(b"Hi\n") + DEBUG_EXIT_3 + SPIN, options)
    assert isinstance(error, errors.GuestGoneError)
    assert error.status == 7
    assert error.console == "Hi\n"


def test_triple_fault_is_told_with_registers(payload, options) -> None:
    error = fail_to_start(payload, TRIPLE_FAULT, options)
    assert isinstance(error, errors.TripleFaultError)
    assert "0x1000000" in str(error)
    assert error.report["registers"]["rip"] == "0x1000000"


def test_panic_text_and_reset_is_a_panic(payload, options) -> None:
    code = write(b"Kernel panic - not syncing: no luck\n") + RESET + SPIN
    error = fail_to_start(payload, code, options)
    assert isinstance(error, errors.PanicError)
    assert str(error).endswith("panicked: no luck")


def test_panic_text_alone_is_a_panic_soon(payload, options) -> None:
    code = write(b"KKernel panic - not syncing: hangs\n") + SPIN
    error = fail_to_start(payload, code, {**options, "boot_timeout": 10})
    assert isinstance(error, errors.PanicError)


def test_reset_is_a_restart(payload, options) -> None:
    error = fail_to_start(payload, RESET + SPIN, options)
    assert isinstance(error, errors.GuestGoneError)
    assert "restarted before it was up" in str(error)


def test_poweroff_event_ends_with_its_status(payload, options) -> None:
    error = fail_to_start(payload, event(layout.EVENT_POWEROFF, 42) + SPIN, options)
    assert error.report["end"] == {"reason": "poweroff", "value": 42}


def test_hang_in_boot_ends_with_the_deadline(payload, options) -> None:
    error = fail_to_start(payload, write(b"so far\n") + SPIN, {**options, "boot_timeout": 0.5})
    assert isinstance(error, errors.TimeoutError)
    assert error.console == "so far\n"


def test_halt_without_interrupts_ends_with_the_deadline(payload, options) -> None:
    error = fail_to_start(payload, HALT, {**options, "boot_timeout": 0.5})
    assert isinstance(error, (errors.TimeoutError, errors.GuestGoneError))


def test_console_flood_is_bounded(payload, options) -> None:
    flood = SERIAL + b"\xb0x\xee\xeb\xfd"  # 1: out dx, al; jmp 1b
    error = fail_to_start(payload, flood, {**options, "boot_timeout": 1})
    assert isinstance(error, errors.TimeoutError)
    assert 0 < len(error.console) <= 262144


def test_event_flood_is_told_once(payload, options) -> None:
    flood = event(layout.EVENT_INIT) + b"\xef\xeb\xfd"  # 1: out dx, eax; jmp 1b
    error = fail_to_start(payload, flood, {**options, "boot_timeout": 0.5})
    assert isinstance(error, errors.TimeoutError)
    assert "init" in error.report["timeline"]


def test_console_descriptor_gets_output_as_it_comes(payload, options, tmp_path: Path) -> None:
    live = os.open(tmp_path / "console", os.O_RDWR | os.O_CREAT)
    fail_to_start(payload, write(b"live\n") + DEBUG_EXIT_3, {**options, "console_fd": live})
    assert os.pread(live, 100, 0) == b"live\n"
    os.close(live)


def test_running_machine_tells_console_and_timeline(payload, options) -> None:
    code = write(b"up\n") + event(layout.EVENT_INIT, 1) + event(layout.EVENT_AGENT) + SPIN
    with Machine(kernel=str(payload(code)), **options) as machine:
        machine.start()
        assert machine.console == "up\n"
        assert machine.console == "up\n"
        assert list(machine.timeline) == ["process", "vcpu_entry", "kernel", "init", "agent"]
        times = [machine.timeline[name] for name in ("vcpu_entry", "init", "agent")]
        assert times == sorted(times)
    assert machine.report()["end"] == {"reason": "stopped", "value": 0}


def test_many_machines_leave_no_process_or_descriptor(payload, options) -> None:
    code = event(layout.EVENT_AGENT) + SPIN
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with Machine(kernel=str(payload(code)), **options) as machine:
            machine.start()
            pid = machine.pid
        assert not Path(f"/proc/{pid}").exists()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_killed_vmm_is_told(payload, options) -> None:
    with Machine(kernel=str(payload(event(layout.EVENT_AGENT) + SPIN)), **options) as machine:
        machine.start()
        assert machine.pid
        os.kill(machine.pid, signal.SIGKILL)
        with pytest.raises(errors.VmmKilledError) as caught:
            machine.explain()
    assert caught.value.signal == 9


def test_machine_that_is_stopped_can_be_stopped_again(payload, options) -> None:
    machine = Machine(kernel=str(payload(event(layout.EVENT_AGENT) + SPIN)), **options)
    machine.start()
    machine.kill()
    machine.kill()
    machine.close()
    assert machine.report()["end"] == {"reason": "stopped", "value": 0}
    with pytest.raises(errors.HostError, match="not running"):
        machine.run(["true"])


def test_front_that_is_killed_takes_its_guest_along(payload, options) -> None:
    kernel = payload(event(layout.EVENT_AGENT) + SPIN)
    script = (
        "import sys, time\nfrom microvm import Machine\n"
        f"machine = Machine(kernel={str(kernel)!r}, **{options!r})\n"
        "machine.start()\nprint(machine.pid, flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    vmm = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{vmm}").exists():
            return
        time.sleep(0.05)
    pytest.fail(f"VMM {vmm} outlived its front")


def test_vmm_is_confined(payload, options) -> None:
    with Machine(kernel=str(payload(event(layout.EVENT_AGENT) + SPIN)), **options) as machine:
        machine.start()
        status = Path(f"/proc/{machine.pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        limits = Path(f"/proc/{machine.pid}/limits").read_text()
        core = next(line for line in limits.splitlines() if line.startswith("Max core"))
        assert core.split()[4:6] == ["0", "0"]
        assert os.getsid(machine.pid or 0) == machine.pid


def test_too_little_memory_for_the_kernel_is_a_config_error(payload, options) -> None:
    code = DEBUG_EXIT_3.ljust(50 << 20, b"\x90")
    with pytest.raises(errors.ConfigError, match="give it more memory"):
        Machine(kernel=str(payload(code)), **options).plan()


def test_more_memory_than_the_host_has_is_told(payload, options) -> None:
    machine = Machine(kernel=str(payload(DEBUG_EXIT_3)), **{**options, "memory": "512G"})
    with pytest.raises(errors.HostError, match="more than this host has"):
        machine.plan()


def test_host_that_gives_no_memory_is_told_in_one_line(payload, options) -> None:
    command = [sys.executable, "-m", "microvm", "run", "--kernel", str(payload(DEBUG_EXIT_3))]
    command += ["--accel", str(options["accel"]), "--initrd", str(options["initrd"]), "-m", "2G"]
    subprocess.run([*command, "--dry-run", "--", "true"], capture_output=True, check=True)
    limit = 1 << 30
    done = subprocess.run(
        [*command, "--", "true"],
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        timeout=60,
        check=False,
    )
    assert done.returncode == 125
    assert done.stderr == (
        b"microvm: guest memory: Cannot allocate memory;"
        b" 2048 MiB are too much for this host: try less\n"
    )


def test_report_is_json_and_counts_exits(payload, options) -> None:
    error = fail_to_start(payload, write(b"0123456789") + DEBUG_EXIT_3, options)
    report = json.loads(json.dumps(error.report))
    assert report["exits"]["io"] >= 10
    assert report["accel"]["name"] == options["accel"]
    assert report["sizes"] == {"memory": 64 << 20, "kernel": 4096, "initrd": 0}


def test_plan_is_described_without_starting(payload, options) -> None:
    machine = Machine(kernel=str(payload(SPIN)), cmdline="a=b", **options)
    text = machine.plan().describe()
    assert isinstance(machine.plan(), plan.Plan)
    assert machine.pid is None
    assert str(payload(SPIN)) in text
    assert text.rstrip().endswith("a=b")
