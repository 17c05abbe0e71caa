"""The host's side of the session protocol: what it says, and what it lets the guest say."""

from __future__ import annotations

import errno
import re
import socket
import struct
from pathlib import Path

import pytest

from microvm import session as sp
from microvm.errors import GuestError, TimeoutError
from microvm.session import Exited, Failed, Program, Session, SessionProtocol, Started, WindowSize

PROTO_H = Path(__file__).resolve().parents[2] / "rootfs" / "proto.h"


def started(pid: int = 7) -> bytes:
    return struct.pack("<III", sp.F_STARTED, 4, pid)


def pair(kind: int, first: int, second: int) -> bytes:
    return struct.pack("<IIII", kind, 8, first, second)


def header_numbers() -> dict[str, int]:
    """Constants of proto.h by their names without the MV_ prefix."""
    text = re.sub(r"/\*.*?\*/", "", PROTO_H.read_text(), flags=re.DOTALL)
    numbers: dict[str, int] = {}
    for name, value in re.findall(r"#define MV_(\w+)[ \t]+(\S.*)", text):
        numbers[name] = eval(value.replace("U", ""))
    for body in re.findall(r"enum \w+ \{(.*?)\}", text, flags=re.DOTALL):
        value = -1
        for item in filter(None, map(str.strip, body.split(","))):
            name, _, given = item.partition("=")
            value = int(given) if given else value + 1
            numbers[name.strip().removeprefix("MV_")] = value
    return numbers


@pytest.mark.parametrize("prefix", ["STREAM_", "CH_", "F_", "EXEC_", "STAGE_", "SHUTDOWN_"])
def test_constants_equal_header(prefix: str) -> None:
    ours = {
        name: value
        for name, value in vars(sp).items()
        if name.startswith(prefix) and isinstance(value, int)
    }
    theirs = {name: v for name, v in header_numbers().items() if name.startswith(prefix)}
    assert ours == theirs


@pytest.mark.parametrize("name", ["HELLO_MAGIC", "FRAME_SEND_MAX", "FRAME_RECV_MAX"])
def test_limits_equal_header(name: str) -> None:
    assert getattr(sp, name) == header_numbers()[name]


def test_exec_frame_known_bytes() -> None:
    program = Program(argv=["a", b"\xff"], env={"K": "v"}, cwd="/d", user="u", realtime=5)
    strings = b"/d\0u\0a\0\xff\0K=v\0"
    head = struct.pack("<IIIIQHHHH", 0, 7, 2, 1, 5, 0, 0, 0, 0)
    expected = struct.pack("<II", 1, len(head) + len(strings)) + head + strings
    assert sp.exec_frame(program, 7) == expected


def test_exec_frame_terminal_has_flag_and_size() -> None:
    program = Program(argv=["sh"], window=WindowSize(rows=50, cols=70000))
    flags, *_, rows, cols, _, _ = struct.unpack_from("<IIIIQHHHH", sp.exec_frame(program, 3), 8)
    assert (flags, rows, cols) == (sp.EXEC_PTY, 50, 65535)


def test_exec_frame_without_argv_asks_for_login_shell() -> None:
    flags, _, argc, *_ = struct.unpack_from("<IIII", sp.exec_frame(Program(argv=[]), 3), 8)
    assert (flags, argc) == (sp.EXEC_LOGIN, 0)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (Program(argv=["a\0b"]), "NUL"),
        (Program(argv=["a"], env={"K": "\0"}), "NUL"),
        (Program(argv=["a"], cwd="\0"), "NUL"),
        (Program(argv=["a" * sp.FRAME_SEND_MAX]), "exceed"),
    ],
)
def test_exec_frame_unsayable_is_refused(program: Program, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sp.exec_frame(program, 0)


@pytest.mark.parametrize("signo", [0, -1, 65])
def test_signal_frame_no_signal_is_refused(signo: int) -> None:
    with pytest.raises(ValueError, match="not a signal"):
        sp.signal_frame(signo)


def test_receive_whole_life_in_single_bytes() -> None:
    protocol = SessionProtocol()
    events: list[sp.Event] = []
    for byte in started() + pair(sp.F_EXIT, 3, 0):
        events += protocol.receive(bytes([byte]))
    assert events == [Started(pid=7), Exited(code=3, signo=0)]
    assert protocol.outcome == Exited(code=3, signo=0)
    assert protocol.receive(b"") == []


def test_receive_whole_life_in_one_piece() -> None:
    protocol = SessionProtocol()
    assert protocol.receive(started() + pair(sp.F_EXIT, 0, 9)) == [
        Started(pid=7),
        Exited(code=0, signo=9),
    ]


@pytest.mark.parametrize(
    "hostile",
    [
        b"\xff" * 8,
        struct.pack("<II", sp.F_EXIT, sp.FRAME_RECV_MAX + 1),
        struct.pack("<II", 0, 0),
        struct.pack("<II", sp.F_EXEC, 0),
        struct.pack("<II", sp.F_STARTED, 0),
        started(0),
        started() + started(),
        started()[:4] + struct.pack("<IQ", 8, 7),
        pair(sp.F_EXIT, 0, 0),
        started() + pair(sp.F_EXIT, 256, 0),
        started() + pair(sp.F_EXIT, 0, 65),
        started() + pair(sp.F_EXIT, 1, 1),
        started() + pair(sp.F_ERROR, sp.STAGE_EXEC, 2),
        pair(sp.F_ERROR, 0, 2),
        pair(sp.F_ERROR, 6, 2),
        pair(sp.F_ERROR, sp.STAGE_EXEC, 0),
        pair(sp.F_ERROR, sp.STAGE_EXEC, 4096),
        started() + pair(sp.F_EXIT, 0, 0) + started(),
        started() + pair(sp.F_EXIT, 0, 0) + pair(sp.F_EXIT, 0, 0),
    ],
)
def test_receive_what_makes_no_sense_raises(hostile: bytes) -> None:
    with pytest.raises(GuestError):
        SessionProtocol().receive(hostile)


@pytest.mark.parametrize("said", [b"", started(), started()[:5]])
def test_receive_end_before_outcome_raises(said: bytes) -> None:
    protocol = SessionProtocol()
    if said:
        protocol.receive(said)
    with pytest.raises(GuestError, match="hung up"):
        protocol.receive(b"")


def test_receive_flood_keeps_nothing() -> None:
    """Bytes that never make a frame are refused before they pile up."""
    protocol = SessionProtocol()
    with pytest.raises(GuestError):
        for _ in range(100):
            protocol.receive(b"A" * 4096)


@pytest.mark.parametrize(
    ("stage", "error", "code", "words"),
    [
        (sp.STAGE_EXEC, errno.ENOENT, 127, "prog: not found in the guest"),
        (sp.STAGE_EXEC, errno.EACCES, 126, "prog: cannot be executed"),
        (sp.STAGE_EXEC, errno.ENOEXEC, 126, "Exec format error"),
        (sp.STAGE_USER, errno.ENOENT, 125, "user 'bob': not known"),
        (sp.STAGE_DIRECTORY, errno.ENOTDIR, 125, "directory '/w': cannot be entered"),
        (sp.STAGE_RESOURCES, errno.ENOMEM, 125, "lacks the resources"),
        (sp.STAGE_PROTOCOL, errno.EPROTO, 125, "refused the request"),
    ],
)
def test_failed_names_what_and_code(stage: int, error: int, code: int, words: str) -> None:
    failed = Failed(stage=stage, error=error)
    assert failed.returncode == code
    text = failed.describe(Program(argv=["prog"], user="bob", cwd="/w"))
    assert words in text
    assert "\n" not in text


def test_exited_by_signal_is_128_and_more() -> None:
    assert Exited(code=0, signo=9).returncode == 137
    assert Exited(code=7, signo=0).returncode == 7


def test_session_wait_past_deadline_raises() -> None:
    near, far = socket.socketpair()
    with far, Session(near) as session, pytest.raises(TimeoutError):
        session.wait(0.01)


def test_session_wait_returns_outcome() -> None:
    near, far = socket.socketpair()
    with far, Session(near) as session:
        far.sendall(started(99) + pair(sp.F_EXIT, 1, 0))
        assert session.wait(5) == Exited(code=1, signo=0)
        assert session.pid == 99


def test_session_signal_after_end_is_nothing() -> None:
    near, far = socket.socketpair()
    far.close()
    with Session(near) as session:
        session.signal(15)
        session.signal(15)


def test_open_session_connects_control_then_data() -> None:
    calls: list[tuple[int, bytes, int, int]] = []
    near, far = socket.socketpair()
    with far:
        far_fd = far.fileno()
        session = sp.open_session(
            lambda *call: calls.append(call),
            (near, far_fd),
            5,
            Program(argv=["x"]),
            (10, 11, 12),
        )
        assert far.recv(4096) == sp.exec_frame(Program(argv=["x"]), 7)
        session.close()
    assert calls == [
        (1024, sp.control_prefix(5), far_fd, far_fd),
        (1024, sp.data_prefix(5, sp.CH_STDIN | sp.CH_STDOUT), 10, 11),
        (1024, sp.data_prefix(5, sp.CH_STDERR), -1, 12),
    ]


def test_open_session_terminal_has_one_data_stream() -> None:
    prefixes: list[bytes] = []
    near, far = socket.socketpair()
    with far:
        sp.open_session(
            lambda _port, prefix, _in, _out: prefixes.append(prefix),
            (near, far.fileno()),
            5,
            Program(argv=["x"], window=WindowSize()),
            (10, 11, 12),
        ).close()
    assert prefixes == [sp.control_prefix(5), sp.data_prefix(5, 3)]


def test_session_module_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, microvm.session; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"dataclasses", "typing", "socket", "json", "trio", "subprocess", "enum"}
