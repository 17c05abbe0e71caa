"""The command itself, as far as it goes without a guest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import microvm
from microvm.cli.console import tail


def test_version_is_printed(cli) -> None:
    done = cli("--version")
    assert (done.returncode, done.stdout) == (0, f"microvm {microvm.__version__}\n".encode())


@pytest.mark.parametrize("verb", [(), ("run",), ("shell",), ("doctor",), ("kernel",)])
def test_help_teaches_with_an_example(cli, verb: tuple[str, ...]) -> None:
    done = cli(*verb, "--help")
    assert done.returncode == 0
    assert b"\n  microvm " in done.stdout
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("rum",), b"rum"),
        (("run",), b"needs a command"),
        (("run", "--"), b"needs a command"),
        (("run", "-m", "lots", "--", "true"), b"--memory 'lots'"),
        (("run", "-m", "1M", "--", "true"), b"64 MiB"),
        (("run", "--frobnicate", "--", "true"), b"--frobnicate"),
        (("run", "--accel", "tcg", "--", "true"), b"tcg"),
        (("run", "--timeout", "soon", "--", "true"), b"--timeout 'soon'"),
        (("run", "--kernel", "/nonexistent/vmlinux", "--", "true"), b"/nonexistent/vmlinux"),
        (("run", "--initrd", "/nonexistent/initrd", "--", "true"), b"/nonexistent/initrd"),
        (("run", "--root", "/nonexistent/image", "--", "true"), b"/nonexistent/image"),
        (("run", "--root", "/tmp", "--", "true"), b"/tmp: cannot read root image"),
        (("run", "--report", "/nonexistent/report", "--", "true"), b"/nonexistent/report"),
        (("run", "--kernel", "/dev/null", "--", "true"), b"/dev/null"),
        (("shell", "ls"), b"microvm run"),
        (("kernel", "frob"), b"frob"),
    ],
)
def test_bad_input_gets_one_line_and_125(cli, args: tuple[str, ...], word: bytes) -> None:
    done = cli(*args)
    assert done.returncode == 125
    assert done.stdout == b""
    assert done.stderr.startswith(b"microvm: ")
    assert done.stderr.count(b"\n") == 1
    assert word in done.stderr


def test_no_arguments_prints_usage_and_fails(cli) -> None:
    done = cli()
    assert done.returncode == 125
    assert b"usage:" in done.stdout


def test_broken_kernel_gets_one_line_and_125(cli, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"\x7fELF" + os.urandom(5000))
    done = cli("run", "--kernel", str(kernel), "--", "true")
    assert done.returncode == 125
    assert done.stderr.count(b"\n") == 1
    assert str(kernel).encode() in done.stderr


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"x" * 1000, b"multiple of 512"), (bytes(8192), b"no ext4"), (b"", b"ext4")],
)
def test_bad_root_image_gets_one_line_and_125(
    cli, tmp_path: Path, content: bytes, word: bytes
) -> None:
    image = tmp_path / "image"
    image.write_bytes(content)
    done = cli("run", "--root", str(image), "--", "true")
    assert done.returncode == 125
    assert done.stderr.startswith(f"microvm: {image}: root image ".encode())
    assert done.stderr.count(b"\n") == 1
    assert word in done.stderr


def test_console_tail_is_safe_for_a_terminal() -> None:
    console = "one\n\x1b[2Jtwo\x07\ttabs\n\n" + "x" * 500 + "\n"
    assert tail(console, 2) == f"| [2Jtwo tabs\n| {'x' * 200}\n"
