"""Linux in a machine, as users have it: boots, commands, streams, terminals, ends.

Rerun one: .venv/bin/python -m pytest tests/guest/test_boot.py -k X
Watch one boot: .venv/bin/python -m microvm run --console -- true
"""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import microvm
from microvm.boot.kernel import load_kernel
from microvm.errors import ConfigError
from microvm.images.kernels import default_kernel, list_kernels

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def kernel() -> str:
    """The default kernel; without one there is nothing to boot."""
    try:
        return default_kernel().path
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def vm() -> Iterator[microvm.Machine]:
    """A guest on the translator that tests share."""
    with microvm.Machine(accel="dbt", boot_timeout=60) as machine:
        machine.start()
        yield machine


def run(cli, *args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return cli("run", "--accel", "dbt", "--timeout", "60s", *args, **options)


# ---- commands, on a shared guest ------------------------------------------------------------


def test_command_output_and_status_come_back(vm) -> None:
    done = vm.run(["sh", "-c", "echo out; echo err >&2; exit 7"], capture_output=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_command_input_is_fed(vm) -> None:
    text = b"line\n" * 50000
    done = vm.run(["wc", "-c"], input=text, capture_output=True, timeout=20)
    assert done.stdout == b"250000\n"


def test_command_stream_is_binary_clean(vm) -> None:
    every = os.urandom(1 << 20) + bytes(range(256))
    assert vm.run(["cat"], input=every, capture_output=True, timeout=30).stdout == every


def test_command_environment_directory_and_user_are_set(vm) -> None:
    script = "echo $A; pwd; id -u; id -un"
    options = {"env": {"A": "b c"}, "cwd": "/tmp", "user": "nobody"}
    done = vm.run(["sh", "-c", script], capture_output=True, timeout=20, **options)
    assert done.stdout.decode().splitlines() == ["b c", "/tmp", "65534", "nobody"]


def test_command_environment_has_nothing_of_the_host(vm, monkeypatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_HOST", "1")
    assert b"SECRET" not in vm.run(["env"], capture_output=True, timeout=20).stdout


@pytest.mark.parametrize(("argv", "status"), [(["nonesuch"], 127), (["/etc/passwd"], 126)])
def test_command_that_cannot_start_raises_with_status(vm, argv: list[str], status: int) -> None:
    with pytest.raises(microvm.CommandError, match=argv[0]) as caught:
        vm.run(argv, timeout=20)
    assert caught.value.returncode == status


def test_command_killed_by_a_signal_gives_128_plus_n(vm) -> None:
    assert vm.run(["sh", "-c", "kill -9 $$"], timeout=20).returncode == 137


def test_command_check_raises_with_output(vm) -> None:
    with pytest.raises(microvm.CommandError) as caught:
        vm.run(["sh", "-c", "echo no; exit 3"], capture_output=True, check=True, timeout=20)
    assert (caught.value.returncode, caught.value.stdout) == (3, b"no\n")


def test_command_timeout_raises_and_the_machine_goes_on(vm) -> None:
    with pytest.raises(microvm.TimeoutError, match="sleep"):
        vm.run(["sleep", "100"], timeout=0.3)
    assert vm.run(["true"], timeout=20).returncode == 0


def test_command_gets_signals(vm) -> None:
    script = "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done"
    reader, writer = os.pipe()
    with vm.spawn(["sh", "-c", script], stdout=writer) as command:
        os.close(writer)
        assert os.read(reader, 10) == b"up\n"
        command.signal(signal.SIGTERM)
        assert command.wait(20).returncode == 9
    os.close(reader)


def test_commands_run_side_by_side(vm) -> None:
    sinks = [microvm.command.Sink() for _ in range(8)]
    commands = [
        vm.spawn(["sh", "-c", f"sleep 0.2; echo {index}"], stdout=sink)
        for index, sink in enumerate(sinks)
    ]
    outputs = [command.wait(30).stdout for command in commands]
    for command in commands:
        command.close()
    assert outputs == [b"%d\n" % index for index in range(8)]


def test_guest_clock_is_the_hosts(vm) -> None:
    told = int(vm.run(["date", "+%s"], capture_output=True, timeout=20).stdout)
    assert abs(told - time.time()) < 3


def test_guest_has_no_zombies(vm) -> None:
    for _ in range(3):
        vm.run(["sh", "-c", "(sleep 0.01 &) ; (true &)"], timeout=20)
    time.sleep(0.3)
    listing = vm.run(["ps", "-o", "stat,comm"], capture_output=True, timeout=20).stdout
    assert not re.search(rb"^Z", listing, re.MULTILINE)


def test_guest_has_what_programs_expect(vm) -> None:
    script = (
        "test -c /dev/null && test -c /dev/urandom && test -d /proc/self && test -d /sys/kernel"
        " && test -e /dev/pts/ptmx && touch /tmp/x && hostname"
    )
    done = vm.run(["sh", "-c", script], capture_output=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, b"microvm\n")


def test_timeline_is_complete_and_in_order(vm) -> None:
    vm.run(["true"], timeout=20)
    points = ["process", "vcpu_entry", "kernel", "init", "agent", "command"]
    assert list(vm.timeline) == points
    assert list(vm.timeline.values()) == sorted(vm.timeline.values())


# ---- the command line, a guest each ------------------------------------------------------------


def test_run_gives_the_commands_status_and_leaves_nothing(cli, tmp_path: Path) -> None:
    script = "echo out; echo err >&2; exit 7"
    done = run(cli, "--", "sh", "-c", script, env={"TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert os.listdir(tmp_path) == []


def test_run_works_in_a_pipe(cli) -> None:
    assert run(cli, "--", "wc", "-c", stdin=b"hi\n").stdout.strip() == b"3"


def test_shell_reads_commands_from_a_pipe(cli) -> None:
    done = cli("shell", "--accel", "dbt", stdin=b"uname -s\nexit 4\n")
    assert (done.returncode, done.stdout) == (4, b"Linux\n")


@pytest.mark.parametrize("release", ["6.1", "6.12"])
def test_stock_kernels_reach_a_command(cli, release: str) -> None:
    names = [kernel.name for kernel in list_kernels() if kernel.name.startswith(release + ".")]
    if not names:
        pytest.skip(f"no kernel {release} in the store: microvm kernel pull {release}")
    done = run(cli, "--kernel", names[0], "--", "uname", "-r")
    assert (done.returncode, done.stdout.decode().strip()) == (0, names[0])


@pytest.mark.parametrize("memory", ["64M", "160M", "1G", "5G"])
def test_memory_sizes_boot(cli, kernel: str, memory: str) -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = microvm.config.parse_size(memory)
    if wanted > there:
        pytest.skip(f"this host has less than {memory}")
    if load_kernel(kernel).end > wanted / 2:
        pytest.skip(f"this kernel alone fills half of {memory}: it is a big one")
    done = run(cli, "-m", memory, "--", "grep", "MemTotal", "/proc/meminfo")
    assert done.returncode == 0, done.stderr
    kilobytes = int(done.stdout.split()[1])
    assert 0.5 * wanted < kilobytes * 1024 <= wanted


def test_report_has_the_whole_timeline(cli, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert run(cli, "--count", "--report", str(path), "--", "true").returncode == 0
    report = json.loads(path.read_bytes())
    points = ["process", "vcpu_entry", "kernel", "init", "agent", "command", "exit"]
    assert list(report["timeline"]) == points
    assert report["kernel"]["version"]
    assert report["counters"]["instructions"] > 1_000_000
    assert report["exits"]["io"] > 0


def test_console_is_shown_on_stderr_only(cli) -> None:
    done = run(cli, "--console", "--", "echo", "hi")
    assert done.stdout == b"hi\n"
    assert b"Linux version" in done.stderr


def test_cmdline_is_appended(cli) -> None:
    done = run(cli, "--cmdline", "some.words=here", "--", "cat", "/proc/cmdline")
    assert done.stdout.decode().split()[-1] == "some.words=here"


def test_panic_is_told_with_the_last_lines(cli) -> None:
    script = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 100"
    done = run(cli, "--", "sh", "-c", script)
    assert done.returncode == 125
    lines = done.stderr.decode().splitlines()
    assert lines[-1].startswith("microvm: the guest's kernel panicked: ")
    assert any("Kernel panic" in line for line in lines[:-1])


@pytest.mark.parametrize("command", ["poweroff", "poweroff -f", "halt -f", "reboot", "reboot -f"])
def test_power_off_from_inside_ends_cleanly(cli, command: str) -> None:
    done = run(cli, "--", "sh", "-c", f"{command}; sleep 100")
    assert (done.returncode, done.stderr) == (0, b"")


def test_init_that_is_missing_panics_with_a_word(cli, tmp_path: Path) -> None:
    initrd = tmp_path / "empty"
    initrd.write_bytes(b"")
    done = run(cli, "--initrd", str(initrd), "--", "true")
    assert done.returncode == 125
    assert b"panicked" in done.stderr


def test_deadline_ends_a_command_with_124(cli) -> None:
    done = cli("run", "--accel", "dbt", "--timeout", "8s", "--", "sleep", "100")
    assert done.returncode == 124
    assert b"still running" in done.stderr


def test_interrupt_reaches_the_guest_command(kernel) -> None:
    command = [sys.executable, "-m", "microvm", "run", "--accel", "dbt", "--", "sh", "-c"]
    script = "trap 'echo caught; exit 9' INT; echo up; while :; do sleep 0.05; done"
    with subprocess.Popen([*command, script], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"caught\n"
        assert process.wait(20) == 9


def test_shell_on_a_terminal_is_one(kernel) -> None:
    fd, slave = pty.openpty()
    termios.tcsetwinsize(fd, (33, 101))
    before = termios.tcgetattr(slave)
    command = [sys.executable, "-m", "microvm", "shell", "--accel", "dbt"]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave) as process:
        said = b""

        def wait_for(word: bytes) -> None:
            nonlocal said
            while word not in said:
                ready, _, _ = select.select([fd], [], [], 60)
                assert ready, said
                said += os.read(fd, 65536)

        wait_for(b"# ")
        os.write(fd, b"stty size; tty; sleep 100\r")
        wait_for(b"33 101\r\n/dev/pts/0\r\n")
        time.sleep(1)  # until sleep runs
        os.write(fd, b"\x03")  # ^C is for it
        os.write(fd, b"echo $((6 * 7)); exit 3\r")
        wait_for(b"\n42\r\n")
        assert process.wait(20) == 3
    assert termios.tcgetattr(slave) == before
    os.close(fd)
    os.close(slave)


def test_root_image_is_the_root_and_is_written(cli, tmp_path: Path) -> None:
    if not any(Path(folder, "mkfs.ext4").exists() for folder in ("/sbin", "/usr/sbin")):
        pytest.skip("no mkfs.ext4 on this host")
    busybox = next(p for p in ("/bin/busybox", "/usr/bin/busybox") if Path(p).exists())
    tree = tmp_path / "tree"
    for folder in ("bin", "dev", "proc", "sys", "tmp", "run", "etc", "root"):
        (tree / folder).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(Path(busybox).read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    for name in ("sh", "cat", "sync"):
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "etc/marker").write_text("ours\n")
    image = tmp_path / "root.ext4"
    subprocess.run(
        ["mkfs.ext4", "-q", "-d", tree, image, "32M"],
        check=True,
        env={"PATH": "/sbin:/usr/sbin:/bin:/usr/bin"},
    )
    script = "cat /etc/marker; echo kept > /etc/new"
    done = run(cli, "--root", str(image), "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, b"ours\n"), done.stderr
    done = run(cli, "--root", str(image), "--", "cat", "/etc/new")
    assert (done.returncode, done.stdout) == (0, b"kept\n"), done.stderr


def test_root_image_that_is_broken_is_told_by_init(cli, tmp_path: Path) -> None:
    image = tmp_path / "broken.ext4"
    image.write_bytes(bytes(1024 + 0x38) + b"\x53\xef" + bytes(1 << 20)[: (1 << 20) - 1082])
    done = run(cli, "--root", str(image), "--", "true")
    assert done.returncode == 125
    last = done.stderr.decode().splitlines()[-1]
    assert last == "microvm: the guest's init gave up: cannot mount root /dev/vda: Invalid argument"


@pytest.mark.parametrize(
    ("then", "pause"),
    [
        (":", 10),  # Linux resets a vsock stream that nobody has finished reading after 8 s
        ("poweroff -f; sleep 100", 2),
    ],
    ids=["exits", "powers-off"],
)
def test_output_waits_for_a_slow_reader(kernel, then: str, pause: int) -> None:
    script = f"head -c 250000 /dev/zero; {then}"
    command = [sys.executable, "-m", "microvm", "run", "--accel", "dbt", "--", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        first = process.stdout.read(1)
        time.sleep(pause)
        assert len(first + process.stdout.read()) == 250000
        assert process.wait(20) == 0


# ---- more than a little of it --------------------------------------------------------------------


def test_gibibyte_goes_through_both_ways_unchanged(kernel) -> None:
    """And the front stays small: nothing of it passes through Python."""
    size = 1 << 30
    command = [sys.executable, "-m", "microvm", "run", "--accel", "dbt", "--", "cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        sent = hashlib.blake2b()
        block = os.urandom(MIB)

        def feed() -> None:
            assert process.stdin
            for _ in range(size // MIB):
                sent.update(block)
                process.stdin.write(block)
            process.stdin.close()

        feeder = threading.Thread(target=feed)
        feeder.start()
        got, count = hashlib.blake2b(), 0
        assert process.stdout
        while part := process.stdout.read(MIB):
            got.update(part)
            count += len(part)
        feeder.join()
        assert process.wait(20) == 0
    assert (count, got.digest()) == (size, sent.digest())
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 600 * 1024


def test_twenty_guests_run_side_by_side_and_two_that_die_harm_nobody() -> None:
    machines = [microvm.Machine(accel="dbt", memory="128M") for _ in range(20)]
    try:
        threads = [threading.Thread(target=machine.start) for machine in machines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert machines[3].pid
        os.kill(machines[3].pid, signal.SIGKILL)
        with pytest.raises(microvm.PanicError):
            machines[4].run(["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 100"], timeout=30)
        for index, machine in enumerate(machines):
            if index not in (3, 4):
                done = machine.run(["echo", str(index)], capture_output=True, timeout=60)
                assert done.stdout == b"%d\n" % index
    finally:
        for machine in machines:
            machine.close()


def test_idle_guest_uses_under_one_percent_of_a_cpu(vm) -> None:
    def used() -> float:
        fields = Path(f"/proc/{vm.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    vm.run(["true"], timeout=20)
    time.sleep(1)
    before = used()
    time.sleep(5)
    assert used() - before < 0.05
