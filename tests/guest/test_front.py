"""The front without a machine: the guest's agent runs behind a stand-in for the VMM.

What is shown here holds for any backend: streams, signals, terminals, deadlines, and what a user
is told when something breaks. Rerun one: .venv/bin/python -m pytest tests/guest/test_front.py -k X
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

GIB = 1 << 30


def test_run_passes_status_and_output_apart(front) -> None:
    done = front("run", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_run_passes_stdin_and_its_end(front) -> None:
    done = front("run", "--", "wc", "-c", stdin=b"hi\n")
    assert (done.returncode, done.stdout.strip()) == (0, b"3")


def test_run_is_binary_clean(front) -> None:
    every = bytes(range(256)) * 1000
    assert front("run", "--", "cat", stdin=every).stdout == every


def test_run_environment_is_only_what_was_asked_for(front) -> None:
    done = front("run", "-e", "A=b c", "-w", "/tmp", "--", "sh", "-c", "env; pwd")
    lines = done.stdout.decode().splitlines()
    assert "A=b c" in lines
    assert "/tmp" in lines
    assert not any(line.startswith(("PYTHONPATH=", "MICROVM_VMM=")) for line in lines)


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["/nonexistent"], 127),
        (["/etc/passwd"], 126),
        (["sh", "-c", "kill -9 $$"], 137),
        (["sh", "-c", "kill -TERM $$"], 143),
    ],
)
def test_run_exit_status_follows_the_shell(front, argv: list[str], status: int) -> None:
    assert front("run", "--", *argv).returncode == status


def test_run_command_not_found_is_named(front) -> None:
    done = front("run", "--", "/nonexistent")
    assert done.stderr == b"microvm: /nonexistent: not found in the guest\n"


def test_run_unknown_user_and_directory_give_125(front) -> None:
    assert front("run", "-u", "nobody-here", "--", "true").returncode == 125
    done = front("run", "-w", "/nonexistent", "--", "true")
    assert done.returncode == 125
    assert done.stderr.count(b"\n") == 1


def test_run_two_cpus_on_the_translator_says_why_not(front) -> None:
    done = front("run", "-c", "2", "--accel", "dbt", "--", "true")
    assert (done.returncode, done.stderr.count(b"\n")) == (125, 1)
    assert b"2 CPUs: the translator runs one" in done.stderr


def test_run_deadline_gives_124_and_is_named(front) -> None:
    done = front("run", "--timeout", "4s", "--", "sleep", "100")
    assert done.returncode == 124
    assert done.stderr == b"microvm: 'sleep' was still running after 4 s\n"


def test_boot_deadline_gives_124(front) -> None:
    done = front("run", "--timeout", "300ms", "--", "true", mode="hang")
    assert done.returncode == 124
    assert b"had not booted after 0.3 s" in done.stderr


def test_panic_shows_the_last_lines_unasked(front) -> None:
    done = front("run", "--", "true", mode="panic")
    assert done.returncode == 125
    lines = done.stderr.decode().splitlines()
    assert lines[0] == "| Linux version 0"
    assert lines[-1] == "microvm: the guest's kernel panicked: No working init found."
    assert b"\x1b" not in done.stderr


def test_poweroff_in_boot_gives_125(front) -> None:
    done = front("run", "--", "true", mode="poweroff")
    assert (done.returncode, done.stderr.count(b"\n")) == (125, 1)
    assert b"powered off before it was up" in done.stderr


def test_killed_vmm_is_told_in_one_line(front) -> None:
    done = front("run", "--", "true", mode="die")
    assert done.returncode == 125
    assert re.fullmatch(
        rb"microvm: the VMM process \d+ was killed by signal 9 \(out of memory\?\);"
        rb" the guest is gone\n",
        done.stderr,
    )


def test_vmm_that_vanishes_under_a_command_is_told_in_one_line(front) -> None:
    done = front("run", "--", "sleep", "5", mode="vanish")
    assert done.returncode == 125
    assert b"ended without a word" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_shell_takes_commands_from_a_pipe(front) -> None:
    done = front("shell", stdin=b"echo $((6 * 7))\nexit 3\n")
    assert (done.returncode, done.stdout) == (3, b"42\n")


def test_closed_pipe_ends_the_command(front) -> None:
    argv = " ".join(front.argv("run", "--", "yes"))
    done = subprocess.run(
        ["bash", "-c", f"{argv} | head -n1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        timeout=20,
        env=front.environment("well"),
        check=False,
    )
    assert done.stdout == b"y\n"
    assert done.returncode in (1, 141)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors_are_empty_ones(front, closed: str) -> None:
    argv = " ".join(front.argv("run", "--", "wc", "-c"))
    done = subprocess.run(
        ["sh", "-c", f"{argv} {closed}"],
        input=b"",
        capture_output=True,
        timeout=60,
        env=front.environment("well"),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == (b"" if ">&-" in closed.replace("2>&-", "") else b"0\n")


def test_report_has_choice_timeline_and_end(front, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("x" * 100000)
    assert front("run", "--report", str(path), "--", "true").returncode == 0
    report = json.loads(path.read_bytes())
    assert report["accel"]["name"] == "dbt"
    assert report["end"] == {"reason": "stopped", "value": 0}
    times = list(report["timeline"].values())
    assert list(report["timeline"])[:2] == ["process", "vcpu_entry"]
    assert times == sorted(times)


def test_report_on_a_full_disk_gives_125(front) -> None:
    done = front("run", "--report", "/dev/full", "--", "true")
    assert done.returncode == 125
    assert done.stderr == b"microvm: --report /dev/full: No space left on device\n"


def test_report_is_written_after_a_failure_too(front, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert front("run", "--report", str(path), "--", "true", mode="panic").returncode == 125
    assert json.loads(path.read_bytes())["end"]["reason"] == "panic"


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in listed.split()]


def gone(pid: int) -> bool:
    """Whether a process has ended within a few seconds, or waits for its parent to notice."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def start(front, *args: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(front.argv(*args), env=front.environment("well"), **options)


def read_until(fd: int, word: bytes, timeout: float = 60) -> bytes:
    """Reads until `word` has come."""
    seen = b""
    deadline = time.monotonic() + timeout
    while word not in seen:
        ready, _, _ = select.select([fd], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"{word!r} did not come, only {seen!r}"
        try:
            part = os.read(fd, 65536)
        except OSError as error:  # how a terminal tells its end
            assert error.errno == errno.EIO
            part = b""
        assert part, f"end before {word!r}, only {seen!r}"
        seen += part
    return seen


@pytest.mark.parametrize("signo", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_front_that_is_killed_leaves_no_process(front, signo: int) -> None:
    process = start(front, "run", "--", "sh", "-c", "echo up; sleep 100", stdout=subprocess.PIPE)
    assert process.stdout
    read_until(process.stdout.fileno(), b"up")
    (vmm,) = children(process.pid)
    process.send_signal(signo)
    assert process.wait(30) == (-9 if signo == signal.SIGKILL else 128 + signo)
    assert gone(vmm)
    process.stdout.close()


def test_first_interrupt_goes_to_the_command(front) -> None:
    script = "trap 'echo caught; exit 9' INT; echo up; while :; do sleep 0.05; done"
    process = start(front, "run", "--", "sh", "-c", script, stdout=subprocess.PIPE)
    assert process.stdout
    read_until(process.stdout.fileno(), b"up")
    process.send_signal(signal.SIGINT)
    assert process.stdout.read() == b"caught\n"
    assert process.wait(30) == 9
    process.stdout.close()


def test_second_interrupt_ends_a_command_that_does_not_care(front) -> None:
    script = "trap '' INT; echo up; for i in $(seq 400); do sleep 0.05; done"
    process = start(front, "run", "--", "sh", "-c", script, stdout=subprocess.PIPE)
    assert process.stdout
    read_until(process.stdout.fileno(), b"up")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.stdout.close()


class Terminal:
    """A command under a terminal of its own."""

    def __init__(self, front, *args: str) -> None:
        self.fd, self._slave = pty.openpty()
        termios.tcsetwinsize(self.fd, (33, 101))
        self.before = termios.tcgetattr(self._slave)
        self.process = start(
            front, *args, stdin=self._slave, stdout=self._slave, stderr=self._slave
        )

    def settings(self) -> list[object]:
        return termios.tcgetattr(self._slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self.fd)
        os.close(self._slave)


def test_terminal_session_has_size_and_resizes(front) -> None:
    script = "stty size; trap 'stty size; exit 5' WINCH; echo up; while :; do sleep 0.05; done"
    with Terminal(front, "run", "--", "sh", "-c", script) as terminal:
        assert b"33 101" in read_until(terminal.fd, b"up")
        termios.tcsetwinsize(terminal.fd, (40, 120))
        terminal.process.send_signal(signal.SIGWINCH)
        read_until(terminal.fd, b"40 120")
        assert terminal.process.wait(30) == 5
        assert terminal.settings() == terminal.before


def test_terminal_keys_go_to_the_guest(front) -> None:
    with Terminal(front, "run", "--", "sh", "-c", "echo up; read line; echo got $line") as terminal:
        read_until(terminal.fd, b"up")
        os.write(terminal.fd, b"a\x15words\r")  # ^U: the guest's terminal edits the line
        read_until(terminal.fd, b"got words")
        assert terminal.process.wait(30) == 0


def test_terminal_interrupt_key_interrupts_the_guest_command(front) -> None:
    with Terminal(front, "run", "--", "sh", "-c", "echo up; exec sleep 100") as terminal:
        read_until(terminal.fd, b"up")
        os.write(terminal.fd, b"\x03")
        assert terminal.process.wait(30) == 130


def test_terminal_escape_key_ends_the_session_with_a_word(front) -> None:
    script = "trap '' HUP INT; echo up; for i in $(seq 400); do sleep 0.05; done"
    with Terminal(front, "run", "--", "sh", "-c", script) as terminal:
        read_until(terminal.fd, b"up")
        os.write(terminal.fd, b"\x1d")
        read_until(terminal.fd, b"session ended")
        assert terminal.process.wait(30) == 129
        assert terminal.settings() == terminal.before


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGHUP])
def test_terminal_is_restored_when_the_front_is_ended(front, signo: int) -> None:
    with Terminal(front, "run", "--", "sh", "-c", "echo up; sleep 100") as terminal:
        read_until(terminal.fd, b"up")
        assert terminal.settings() != terminal.before
        terminal.process.send_signal(signo)
        assert terminal.process.wait(30) == 128 + signo
        assert terminal.settings() == terminal.before
