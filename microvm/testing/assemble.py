"""GNU as for payloads: Intel syntax in, flat bytes out, each source assembled once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from microvm.errors import HostError


def _run(command: list[str], source: str = "") -> None:
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"{command[0]} failed:\n{done.stderr}\n{source}")


def assemble(source: str, org: int, *, bits: int = 64) -> bytes:
    """Assembles Intel-syntax `source`, to be placed at virtual address `org`.

    bits: 16, 32 or 64, the mode that the source begins in (`.code16` and friends change it).
    The result is kept in the temporary directory, by the source's hash. Raises HostError with
    the assembler's message if the source is wrong.
    """
    text = f".intel_syntax noprefix\n.code{bits}\n.text\n.globl _start\n_start:\n{source}\n"
    key = hashlib.sha256(f"{org:x}\n{text}".encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"microvm-payloads-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    flat = folder / f"{key}.bin"
    if not flat.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            obj, out = f"{work}/o", f"{work}/bin"
            _run(["as", "--64", "-o", obj, "-"], text)
            _run(["ld", f"-Ttext={org:#x}", "--oformat", "binary", "-o", out, obj])
            Path(out).rename(flat)
    return flat.read_bytes()
