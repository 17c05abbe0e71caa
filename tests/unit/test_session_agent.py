"""The guest's agent, run on the host: `init agent FD` on a unix socket, no machine around it.

Rerun one test: .venv/bin/python -m pytest tests/unit/test_session_agent.py -k NAME
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pwd
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from microvm import session as sp
from microvm.errors import GuestError
from microvm.session import Exited, Failed, Program, Session, WindowSize

ROOT = Path(__file__).resolve().parents[2]
STDIO = sp.CH_STDIN | sp.CH_STDOUT
ALL = STDIO | sp.CH_STDERR

as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root may be another user, or be in root's home"
)


class Agent:
    """A running agent, and what connects to it."""

    def __init__(self, init: Path, directory: Path) -> None:
        self.path = str(directory / "agent")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(64)
        fd = listener.fileno()
        self.process = subprocess.Popen([init, "agent", str(fd)], pass_fds=[fd])
        listener.close()
        self.sockets: list[socket.socket] = []
        self.next_session = 1

    def connect(self, prefix: bytes) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX)
        self.sockets.append(stream)
        stream.connect(self.path)
        stream.settimeout(20)
        stream.sendall(prefix)
        return stream

    def start(self, program: Program, channels: int = ALL) -> Running:
        number = self.next_session
        self.next_session += 1
        session = Session(self.connect(sp.control_prefix(number)))
        session.start(program, channels)
        out = err = None
        if channels & STDIO:
            out = self.connect(sp.data_prefix(number, channels & STDIO))
        if channels & sp.CH_STDERR:
            err = self.connect(sp.data_prefix(number, sp.CH_STDERR))
        return Running(session, out, err)

    def run(
        self, *argv: str, stdin: bytes = b"", user: str = "", cwd: str = "/", **env: str
    ) -> Running:
        running = self.start(Program(argv=argv, user=user, cwd=cwd, env=env))
        running.feed(stdin)
        running.finish()
        return running

    def children(self) -> list[str]:
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return task.read_text().split()

    def close(self) -> None:
        for stream in self.sockets:
            stream.close()
        self.process.kill()
        self.process.wait()


class Running:
    """A session with its data streams, read to their end."""

    def __init__(
        self, session: Session, out: socket.socket | None, err: socket.socket | None
    ) -> None:
        self.session = session
        self.out_stream, self.err_stream = out, err
        self.out = self.err = b""

    def feed(self, data: bytes) -> None:
        assert self.out_stream
        with contextlib.suppress(OSError):  # the program may be over already
            self.out_stream.sendall(data)
            self.out_stream.shutdown(socket.SHUT_WR)

    def finish(self) -> sp.Outcome:
        if self.out_stream:
            self.out += read_all(self.out_stream)
        if self.err_stream:
            self.err += read_all(self.err_stream)
        return self.session.wait(20)

    def read_until(self, text: bytes) -> bytes:
        assert self.out_stream
        while text not in self.out:
            part = self.out_stream.recv(65536)
            assert part, f"ended after {self.out!r}"
            self.out += part
        return self.out

    @property
    def code(self) -> int:
        outcome = self.session.outcome
        assert isinstance(outcome, Exited), outcome
        return outcome.returncode


def read_all(stream: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):  # it had not read all that was sent
        while part := stream.recv(1 << 20):
            parts.append(part)
    return b"".join(parts)


def wait_for(condition: object, seconds: float = 10) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="session")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("rootfs")
    subprocess.run(["make", "-s", "-C", ROOT / "rootfs", f"BUILD={build}"], check=True)
    return build / "init"


@pytest.fixture
def agent(init: Path, tmp_path: Path) -> Iterator[Agent]:
    one = Agent(init, tmp_path)
    try:
        yield one
        assert one.process.poll() is None, "the agent died"
    finally:
        one.close()


def test_init_is_small(init: Path) -> None:
    assert init.stat().st_size < 100_000


def test_init_not_as_pid_1_refuses(init: Path) -> None:
    done = subprocess.run([init], capture_output=True, check=False)
    assert done.returncode == 125
    assert done.stderr.startswith(b"microvm: start as PID 1")


@pytest.mark.parametrize("code", [0, 1, 7, 124, 125, 126, 127, 128, 255])
def test_exit_any_status_is_exact(agent: Agent, code: int) -> None:
    assert agent.run("sh", "-c", f"exit {code}").session.outcome == Exited(code=code, signo=0)


@pytest.mark.parametrize("signo", [signal.SIGKILL, signal.SIGSEGV, signal.SIGPIPE, 34, 64])
def test_exit_by_signal_names_it(agent: Agent, signo: int) -> None:
    running = agent.run("sh", "-c", f"ulimit -c 0; kill -{signo} $$")
    assert running.session.outcome == Exited(code=0, signo=signo)


def test_output_both_channels_stay_apart(agent: Agent) -> None:
    running = agent.run("sh", "-c", "echo out; echo err >&2; cat", stdin=b"in\0\xff\n")
    assert (running.out, running.err, running.code) == (b"out\nin\0\xff\n", b"err\n", 0)


def test_output_before_exit_is_complete(agent: Agent) -> None:
    """The program ends with its pipe full and nobody reading yet."""
    running = agent.start(Program(argv=["head", "-c", "60000", "/dev/zero"], cwd="/"))
    time.sleep(0.1)
    running.finish()
    assert running.out == bytes(60000)


def test_output_exit_comes_after_last_byte(agent: Agent) -> None:
    """A reader that is slow holds the exit back: it is sent when all output has been."""
    running = agent.start(Program(argv=["head", "-c", "8000000", "/dev/zero"], cwd="/"))
    with pytest.raises(TimeoutError):
        running.session.wait(0.2)
    running.finish()
    assert len(running.out) == 8000000


def test_output_reopened_by_name_works(agent: Agent) -> None:
    """Scripts write to /dev/stderr; that is an error on sockets, not on pipes."""
    running = agent.run("sh", "-c", "echo a > /dev/stderr; echo b > /dev/stdout; cat /dev/stdin")
    assert (running.out, running.err) == (b"b\n", b"a\n")


def test_output_of_orphan_does_not_hold_session(agent: Agent) -> None:
    started = time.monotonic()
    running = agent.run("sh", "-c", "sleep 5 & echo done")
    assert running.out == b"done\n"
    assert time.monotonic() - started < 3


def test_output_reader_gone_program_gets_sigpipe(agent: Agent) -> None:
    running = agent.start(Program(argv=["yes"], cwd="/"))
    running.read_until(b"y\n")
    assert running.out_stream
    running.out_stream.close()
    assert running.session.wait(20) == Exited(code=0, signo=signal.SIGPIPE)


def test_stdin_end_is_passed_on(agent: Agent) -> None:
    assert agent.run("wc", "-c", stdin=b"hi\n").out == b"3\n"


def test_stdin_closed_early_is_told(agent: Agent) -> None:
    """A program that closes its stdin stops the host from sending on."""
    running = agent.start(Program(argv=["sh", "-c", "exec <&-; echo closed; sleep 9"], cwd="/"))
    running.read_until(b"closed\n")
    assert running.out_stream
    with pytest.raises(BrokenPipeError):
        for _ in range(100):
            running.out_stream.sendall(bytes(65536))
            time.sleep(0.01)


def test_stdin_not_read_does_not_stop_output(agent: Agent) -> None:
    running = agent.start(Program(argv=["sh", "-c", "sleep 0.2; echo free"], cwd="/"))
    assert running.out_stream
    running.out_stream.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            running.out_stream.send(bytes(1 << 20))
    running.out_stream.settimeout(20)
    assert running.read_until(b"free\n")


def test_channels_absent_are_dev_null(agent: Agent) -> None:
    script = "test -c /dev/stdin && test -c /dev/stdout && test -c /dev/stderr && cat && exit 3"
    running = agent.start(Program(argv=["sh", "-c", script], cwd="/"), channels=0)
    assert running.finish() == Exited(code=3, signo=0)


def test_streams_before_control_are_matched(agent: Agent) -> None:
    number = 77
    out = agent.connect(sp.data_prefix(number, sp.CH_STDOUT))
    time.sleep(0.05)
    session = Session(agent.connect(sp.control_prefix(number)))
    session.start(Program(argv=["echo", "late"], cwd="/"), sp.CH_STDOUT)
    assert read_all(out) == b"late\n"
    assert session.wait(20) == Exited(code=0, signo=0)


def test_stream_byte_by_byte_is_understood(agent: Agent) -> None:
    control = agent.connect(b"")
    message = sp.control_prefix(5) + sp.exec_frame(Program(argv=["true"], cwd="/"), 0)
    for i in range(len(message)):
        control.sendall(message[i : i + 1])
    assert Session(control).wait(20) == Exited(code=0, signo=0)


def test_sessions_many_at_once_are_kept_apart(agent: Agent) -> None:
    running = [agent.start(Program(argv=["cat"], cwd="/")) for _ in range(50)]
    for number, one in reversed(list(enumerate(running))):
        one.feed(b"%d" % number)
    for number, one in enumerate(running):
        assert one.finish() == Exited(code=0, signo=0)
        assert one.out == b"%d" % number


def test_sessions_past_bound_are_refused_then_accepted(agent: Agent) -> None:
    held = []
    for number in range(1000, 1150):
        held.append(agent.connect(sp.data_prefix(number, sp.CH_STDOUT)))
    assert held[-1].recv(1) == b""
    for stream in held:
        stream.close()

    def accepted() -> bool:
        with contextlib.suppress(GuestError, ConnectionError):
            return agent.run("true").code == 0
        return False

    wait_for(accepted)


@pytest.mark.slow
def test_gigabyte_through_cat_is_identical(agent: Agent) -> None:
    """1 GiB of bytes that differ goes in and comes out, with a bounded agent between."""
    block = hashlib.shake_128(b"microvm").digest((1 << 20) - 1)
    total = 1 << 30
    sent = received = 0
    digest_in, digest_out = hashlib.blake2b(), hashlib.blake2b()
    running = agent.start(Program(argv=["cat"], cwd="/"))
    stream = running.out_stream
    assert stream
    stream.setblocking(False)
    view = memoryview(block)
    while received < total:
        readable, writable, _ = select.select([stream], [stream] if sent < total else [], [], 20)
        assert readable or writable, f"stuck after {received} bytes"
        if writable:
            at = sent % len(block)
            part = view[at : at + min(len(block) - at, total - sent)]
            n = stream.send(part)
            digest_in.update(part[:n])
            sent += n
            if sent == total:
                stream.shutdown(socket.SHUT_WR)
        if readable:
            data = stream.recv(1 << 20)
            assert data
            digest_out.update(data)
            received += len(data)
    assert stream.recv(1) == b""
    assert digest_in.digest() == digest_out.digest()
    assert running.session.wait(20) == Exited(code=0, signo=0)
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 4096, f"the agent used {peak} KiB"


def test_environment_has_only_defaults_and_given(agent: Agent) -> None:
    running = agent.run("env", A="b=c", LANG="C.UTF-8")
    root = pwd.getpwuid(0)
    assert sorted(running.out.decode().split()) == sorted(
        [
            "A=b=c",
            "LANG=C.UTF-8",
            f"HOME={root.pw_dir}",
            "USER=root",
            "LOGNAME=root",
            f"SHELL={root.pw_shell}",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ]
    )


def test_environment_given_beats_default(agent: Agent) -> None:
    running = agent.run("/usr/bin/env", HOME="/x", PATH="/nowhere")
    assert b"HOME=/x\n" in running.out
    assert b"PATH=/nowhere\n" in running.out
    assert running.out.count(b"HOME=") == 1


def test_argv_any_bytes_are_verbatim(agent: Agent) -> None:
    odd = ["", " ", "a\nb", "*", "'\"", "\udcff\udc80"]
    running = agent.run("printf", "%s|", *odd)
    assert running.out == b"".join(os.fsencode(one) + b"|" for one in odd)


def test_argv_very_long_is_passed(agent: Agent) -> None:
    assert agent.run("sh", "-c", "echo ${#1}", "sh", "x" * 120000).out == b"120000\n"


def test_directory_given_is_entered(agent: Agent) -> None:
    assert agent.run("pwd", cwd="/usr").out == b"/usr\n"


@as_root
def test_directory_not_given_is_home(agent: Agent) -> None:
    assert agent.run("pwd", cwd="").out.decode().strip() == pwd.getpwuid(0).pw_dir


def test_directory_missing_fails(agent: Agent) -> None:
    outcome = agent.run("true", cwd="/no/such").session.outcome
    assert outcome == Failed(stage=sp.STAGE_DIRECTORY, error=errno.ENOENT)


@pytest.mark.parametrize(
    ("name", "error", "code"),
    [
        ("no-such-program", errno.ENOENT, 127),
        ("/no/such/program", errno.ENOENT, 127),
        ("", errno.ENOENT, 127),
        ("/etc/passwd", errno.EACCES, 126),
        ("/etc", errno.EACCES, 126),
    ],
)
def test_program_not_runnable_is_told_apart(agent: Agent, name: str, error: int, code: int) -> None:
    outcome = agent.run(name).session.outcome
    assert outcome == Failed(stage=sp.STAGE_EXEC, error=error)
    assert outcome.returncode == code


def test_program_script_without_interpreter_line_runs(agent: Agent, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "ran $1"\n')
    script.chmod(0o755)
    assert agent.run(str(script), "it").out == b"ran it\n"


def test_program_not_found_is_reaped(agent: Agent) -> None:
    agent.run("no-such-program")
    wait_for(lambda: not agent.children())


@as_root
def test_user_by_name_has_its_ids_and_home(agent: Agent) -> None:
    running = agent.run("sh", "-c", "id -u; id -g; id -G; echo $HOME $USER", user="daemon")
    daemon = pwd.getpwnam("daemon")
    groups = " ".join(map(str, os.getgrouplist("daemon", daemon.pw_gid)))
    expected = f"{daemon.pw_uid}\n{daemon.pw_gid}\n{groups}\n{daemon.pw_dir} daemon\n"
    assert running.out.decode() == expected


@as_root
@pytest.mark.parametrize(
    ("spec", "ids"),
    [("12345", "12345 12345"), ("12345:54321", "12345 54321"), ("daemon:daemon", "1 1")],
)
def test_user_by_number_or_with_group_is_taken(agent: Agent, spec: str, ids: str) -> None:
    assert agent.run("sh", "-c", "echo $(id -u) $(id -g)", user=spec).out.decode() == ids + "\n"


@as_root
def test_user_cannot_get_back_to_root(agent: Agent) -> None:
    running = agent.run("grep", "-E", "^(Uid|Gid|CapPrm|CapEff)", "/proc/self/status", user="1")
    fields = dict(line.split(":") for line in running.out.decode().splitlines())
    assert fields["Uid"].split() == ["1"] * 4
    assert fields["Gid"].split() == ["1"] * 4
    assert int(fields["CapPrm"], 16) == int(fields["CapEff"], 16) == 0


@pytest.mark.parametrize("spec", ["nosuchuser", "root:nosuchgroup", "0x1", "-1", "4294967295"])
def test_user_unknown_fails(agent: Agent, spec: str) -> None:
    outcome = agent.run("true", user=spec).session.outcome
    assert outcome == Failed(stage=sp.STAGE_USER, error=errno.ENOENT)


def test_signal_reaches_whole_group(agent: Agent) -> None:
    child = "(trap 'echo child; exit' TERM; while :; do sleep 0.05; done) &"
    script = f"{child} trap 'wait; exit 3' TERM; echo up; wait"
    running = agent.start(Program(argv=["sh", "-c", script], cwd="/"))
    running.read_until(b"up\n")
    time.sleep(0.1)
    running.session.signal(signal.SIGTERM)
    assert running.finish() == Exited(code=3, signo=0)
    assert b"child\n" in running.out


def test_signal_before_start_is_kept(agent: Agent) -> None:
    control = agent.connect(sp.control_prefix(9))
    session = Session(control)
    session.start(Program(argv=["sleep", "60"], cwd="/"), sp.CH_STDOUT)
    session.signal(signal.SIGINT)
    time.sleep(0.05)
    agent.connect(sp.data_prefix(9, sp.CH_STDOUT))
    assert session.wait(20) == Exited(code=0, signo=signal.SIGINT)


def test_signal_stop_and_continue_do_not_end_session(agent: Agent) -> None:
    running = agent.start(Program(argv=["cat"], cwd="/"))
    assert running.out_stream
    running.out_stream.sendall(b"1")
    running.read_until(b"1")
    running.session.signal(signal.SIGSTOP)
    running.session.signal(signal.SIGCONT)
    running.feed(b"2")
    assert running.finish() == Exited(code=0, signo=0)
    assert running.out == b"12"


def test_signal_mask_of_program_is_empty(agent: Agent) -> None:
    running = agent.run("grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
    blocked, ignored = (int(line.split()[1], 16) for line in running.out.splitlines())
    libc_own = 7 << 31  # 32 to 34: whoever started the tests may ignore them, no libc can undo it
    assert (blocked, ignored & ~libc_own) == (0, 0)


def test_descriptors_of_agent_do_not_leak(agent: Agent) -> None:
    idle = agent.start(Program(argv=["cat"], cwd="/"))
    running = agent.run("sh", "-c", "ls /proc/$$/fd")
    assert running.out == b"0\n1\n2\n"
    idle.feed(b"")
    idle.finish()


def test_disconnect_hangs_program_up(agent: Agent, tmp_path: Path) -> None:
    mark = tmp_path / "hung-up"
    script = f"trap 'echo > {mark}; exit' HUP; echo up; while :; do sleep 0.05; done"
    running = agent.start(Program(argv=["sh", "-c", script], cwd="/"))
    running.read_until(b"up\n")
    running.session.close()
    wait_for(mark.exists)
    wait_for(lambda: not agent.children())


def test_disconnect_deaf_program_is_killed(agent: Agent) -> None:
    running = agent.start(Program(argv=["sh", "-c", "trap '' HUP; echo up; sleep 60"], cwd="/"))
    running.read_until(b"up\n")
    running.session.close()
    wait_for(lambda: not agent.children())


def test_hangup_frame_still_tells_exit(agent: Agent) -> None:
    running = agent.start(Program(argv=["sleep", "60"], cwd="/"))
    assert running.session.receive()
    running.session.hangup()
    assert running.session.wait(20) == Exited(code=0, signo=signal.SIGHUP)


def test_zombies_of_orphans_are_reaped(agent: Agent) -> None:
    agent.run("sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.1 &) ; done")
    wait_for(lambda: not agent.children())


def start_terminal(agent: Agent, *argv: str, rows: int = 33, cols: int = 99) -> Running:
    window = WindowSize(rows=rows, cols=cols)
    return agent.start(Program(argv=argv, cwd="/", window=window), channels=STDIO)


def test_terminal_has_size_and_is_controlling(agent: Agent) -> None:
    running = start_terminal(agent, "sh", "-c", "stty size; tty; echo x > /dev/tty; echo $TERM")
    assert running.finish() == Exited(code=0, signo=0)
    lines = running.out.decode().split("\r\n")
    assert lines[0] == "33 99"
    assert lines[1].startswith("/dev/pts/")
    assert lines[2:4] == ["x", "linux"]


def test_login_shell_is_the_users_own(agent: Agent) -> None:
    running = agent.start(Program(argv=[], env={"HOME": "/"}))
    running.feed(b"echo $0; shopt -q login_shell && echo login\n")
    assert running.finish() == Exited(code=0, signo=0)
    name = os.path.basename(pwd.getpwuid(0).pw_shell)
    assert running.out.decode().startswith(f"-{name}\n")


def test_terminal_resize_sends_sigwinch(agent: Agent) -> None:
    script = "trap 'stty size; exit' WINCH; echo up; while :; do sleep 0.05; done"
    running = start_terminal(agent, "sh", "-c", script)
    running.read_until(b"up")
    running.session.resize(WindowSize(rows=11, cols=22))
    running.finish()
    assert b"11 22" in running.out


def test_terminal_interrupt_key_ends_foreground(agent: Agent) -> None:
    running = start_terminal(agent, "cat")
    assert running.out_stream
    running.out_stream.sendall(b"up\n")
    running.read_until(b"up\r\nup\r\n")  # the terminal's echo, then cat's
    running.out_stream.sendall(b"\x03")
    assert running.finish() == Exited(code=0, signo=signal.SIGINT)


def test_terminal_end_of_input_is_passed_on(agent: Agent) -> None:
    running = start_terminal(agent, "cat")
    running.feed(b"hi\n")
    assert running.finish() == Exited(code=0, signo=0)
    assert running.out.startswith(b"hi\r\nhi\r\n")


def test_terminal_shell_has_job_control(agent: Agent) -> None:
    running = start_terminal(agent, "bash", "--norc", "-i")
    assert running.out_stream
    running.read_until(b"# ")
    running.out_stream.sendall(b"echo u''p; sleep 60\n")
    running.read_until(b"up")
    time.sleep(0.1)
    running.out_stream.sendall(b"\x1a")
    running.read_until(b"Stopped")
    running.out_stream.sendall(b"kill %1; fg; exit 5\n")
    assert running.finish() == Exited(code=5, signo=0)
    assert b"no job control" not in running.out


def test_terminal_disconnect_hangs_up(agent: Agent) -> None:
    running = start_terminal(agent, "sh", "-c", "echo up; sleep 60; :")
    running.read_until(b"up")
    running.session.close()
    wait_for(lambda: not agent.children())


def test_terminal_output_is_complete(agent: Agent) -> None:
    running = start_terminal(agent, "sh", "-c", "stty -opost; seq 1 20000")
    running.finish()
    assert running.out.decode().splitlines() == [str(i) for i in range(1, 20001)]


@pytest.mark.parametrize(
    "message",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        sp.control_prefix(9) + sp.frame(99),
        sp.control_prefix(9) + sp.frame(sp.F_EXEC, b"short"),
        sp.control_prefix(9) + sp.frame(sp.F_EXEC, bytes(32)),
        sp.control_prefix(9) + sp.frame(sp.F_EXEC, b"\xff" * 64),
        sp.control_prefix(9) + b"\x01\0\0\0\xff\xff\xff\xff",
        sp.control_prefix(9) + sp.frame(sp.F_SIGNAL, b"\0\0"),
        sp.data_prefix(9, 0),
        sp.data_prefix(9, 8),
        sp.data_prefix(9, sp.CH_STDOUT | sp.CH_STDERR),
    ],
)
def test_garbage_ends_only_its_stream(agent: Agent, message: bytes) -> None:
    running = agent.start(Program(argv=["cat"], cwd="/"))
    stream = agent.connect(message)
    assert len(read_all(stream)) <= 64
    running.feed(b"alive")
    assert running.finish() == Exited(code=0, signo=0)
    assert running.out == b"alive"


def test_garbage_after_start_hangs_up(agent: Agent) -> None:
    running = agent.start(Program(argv=["sh", "-c", "echo up; sleep 60"], cwd="/"))
    running.read_until(b"up\n")
    agent.sockets[-3].sendall(b"\xff" * 100)
    wait_for(lambda: not agent.children())


def test_control_second_of_same_session_is_refused(agent: Agent) -> None:
    running = agent.start(Program(argv=["cat"], cwd="/"))
    second = agent.connect(sp.control_prefix(1))
    assert second.recv(1) == b""
    running.feed(b"x")
    assert running.finish() == Exited(code=0, signo=0)


def test_shutdown_ends_agent_with_status(init: Path, tmp_path: Path) -> None:
    one = Agent(init, tmp_path)
    session = Session(one.connect(sp.control_prefix(1)))
    session.shutdown(status=9)
    assert one.process.wait(10) == 9
    one.close()


def test_idle_agent_uses_no_cpu(agent: Agent) -> None:
    """Edge-triggered watches that are always ready must not spin."""
    idle = [agent.start(Program(argv=["cat"], cwd="/")) for _ in range(5)]
    for one in idle:
        assert one.out_stream
        one.out_stream.sendall(b"x")
        one.read_until(b"x")
    before = Path(f"/proc/{agent.process.pid}/stat").read_text().split()[13:15]
    time.sleep(0.5)
    assert Path(f"/proc/{agent.process.pid}/stat").read_text().split()[13:15] == before


def test_shutdown_hangs_terminals_up(init: Path, tmp_path: Path) -> None:
    one = Agent(init, tmp_path)
    running = start_terminal(one, "bash", "--norc", "-i")
    running.read_until(b"# ")
    assert running.session.receive()
    running.session.shutdown()
    assert one.process.wait(10) == 0
    wait_for(lambda: not Path(f"/proc/{running.session.pid}").exists())
    one.close()
