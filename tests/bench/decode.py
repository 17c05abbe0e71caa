"""Decoding speed: nanoseconds per instruction over the code of a real program.

python tests/bench/decode.py [ELF FILE]     (default: /bin/bash)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[2]


def main(program: str) -> int:
    """Builds decode.c with the decoder, runs it on the program's .text."""
    with open(program, "rb") as file:
        text = ELFFile(file).get_section_by_name(".text")
        if text is None:
            sys.exit(f"{program}: no .text section")
        offset, size = text["sh_offset"], text["sh_size"]
    dbt = ROOT / "native/vcpu/dbt"
    with tempfile.TemporaryDirectory() as build:
        binary = Path(build) / "decode"
        cc = os.environ.get("CC", "cc").split()
        flags = ["-std=gnu11", "-O2", "-fPIC", f"-I{ROOT / 'native/include'}", f"-I{dbt}"]
        objects = []
        for source in (dbt / "decode.c", dbt / "insn_table.c"):  # as native/Makefile does
            objects.append(str(Path(build) / (source.stem + ".o")))
            gp = [*flags, "-mgeneral-regs-only", "-c", "-o", objects[-1], str(source)]
            subprocess.run([*cc, *gp], check=True)
        bench = [*flags, "-o", str(binary), str(Path(__file__).with_suffix(".c")), *objects]
        subprocess.run([*cc, *bench], check=True)
        return subprocess.run([str(binary), program, str(offset), str(size)]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "/bin/bash"))
