"""``kernel build``: our own kernel from the distribution's source.

The newest ``linux-source`` package that apt offers is fetched and unpacked in the cache. The
configuration is ``allnoconfig`` plus what kernel/*.config names, each line with its reason; a line
that Kconfig did not keep is an error, since nobody would notice it missing later. Only ``vmlinux``
is built. What is built is kept under a key of all that went into it, so that asking twice costs
nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile

from microvm.dirs import cache_dir
from microvm.errors import ConfigError, HostError
from microvm.images import deb, install
from microvm.images.kernels import BUILT, StoredKernel, list_kernels
from microvm.images.pull import Progress, download

_SOURCE_PACKAGE = re.compile(r"linux-source-(\d+)\.(\d+)$")
_OLDEST = (6, 1)
_LINE = re.compile(
    r'(?P<symbol>CONFIG_\w+)=(?P<value>"[^"]*"|[^\s#]+)\s+#\s+'
    r"(\[(?P<when>>=|<)(?P<version>\d+\.\d+)\]\s*)?(?P<reason>\S.*)"
)
_TOOLS = {  # program: Debian package
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
    "perl": "perl",
}
_HEADERS = {"libelf.h": "libelf-dev"}  # objtool links it
_MAKE = (
    "make",
    "--no-print-directory",
    "KBUILD_BUILD_USER=microvm",
    "KBUILD_BUILD_HOST=microvm",
    "KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970",  # equal input, equal bytes
)
#: What make prints for 6.12; the bar ends a little early or late with other versions.
_STEPS = 1900


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress is shown."""


def fragment_dir() -> str:
    """Where kernel/*.config are: beside the package in the source tree, else within it."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for place in (os.path.join(here, "kernel"), os.path.join(os.path.dirname(here), "kernel")):
        if os.path.isfile(os.path.join(place, "cpu.config")):
            return place
    raise ConfigError(f"{here}: kernel configuration is missing: install the package again")


def read_fragments(folder: str, version: tuple[int, ...]) -> dict[str, str]:
    """Symbol to value of all fragments, for a kernel's version.

    A line is ``CONFIG_X=value  # reason``; a reason that begins with [>=6.9] or [<6.9] limits it
    to such versions. Raises ``ConfigError`` for a line without reason or a symbol named twice.
    """
    wanted: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".config"):
            continue
        path = os.path.join(folder, name)
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
        for number, line in enumerate(lines, 1):
            if not line or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise ConfigError(f"{path}:{number}: write CONFIG_X=value  # reason")
            if not _applies(match["when"], match["version"], version):
                continue
            if match["symbol"] in wanted:
                raise ConfigError(f"{path}:{number}: {match['symbol']} is named twice")
            wanted[match["symbol"]] = match["value"]
    return wanted


def _applies(when: str | None, limit: str | None, version: tuple[int, ...]) -> bool:
    if when is None or limit is None:
        return True
    newer = version[:2] >= tuple(int(part) for part in limit.split("."))
    return newer if when == ">=" else not newer


def lost_lines(wanted: dict[str, str], config: str) -> list[str]:
    """Lines of the fragments that Kconfig did not keep, with what it made of them."""
    have = dict(re.findall(r"^(CONFIG_\w+)=(.*)$", config, re.MULTILINE))
    return [
        f"{symbol}={value} (is {have.get(symbol, 'n')})"
        for symbol, value in wanted.items()
        if have.get(symbol, "n") != value
    ]


def build_kernel(progress: Progress = _silent, jobs: int | None = None) -> StoredKernel:
    """Builds the tuned kernel, or finds it built, and stores it; it is the default from then on.

    ``jobs`` is how many compilers run at once, by default one a CPU. Raises ``ConfigError`` if
    something is missing to build it, ``HostError`` if the build fails.
    """
    _check_tools()
    package = newest_source()
    root = os.path.join(cache_dir(), "build")
    try:
        os.makedirs(root, exist_ok=True)
        source = _source_tree(package, root, progress)
        wanted = read_fragments(fragment_dir(), _version(source))
        key = _key(source, wanted)
        for kernel in list_kernels():
            if kernel.origin == BUILT and _read(_beside(kernel, "key")) == key:
                return kernel
        output = os.path.join(root, f"out-{key}")
        os.makedirs(output, exist_ok=True)
        _configure(source, output, wanted)
        _compile(source, output, jobs or os.cpu_count() or 1, progress)
        return _store(output, key)
    except OSError as error:
        raise HostError(f"{root}: kernel build: {error.strerror or error}") from error


def _check_tools() -> None:
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    for header, package in _HEADERS.items():
        if not os.path.exists(os.path.join("/usr/include", header)):
            missing.append(package)
    if missing:
        raise ConfigError(
            f"a kernel cannot be built without {', '.join(missing)}:"
            f" run `apt-get install {' '.join(missing)}` as root"
        )
    if shutil.which("apt-get") is None or shutil.which("apt-cache") is None:
        raise ConfigError("there is no apt to fetch the kernel's source with")


def newest_source() -> str:
    """The newest source package of at least 6.1 that apt offers."""
    names = subprocess.run(
        ["apt-cache", "pkgnames", "linux-source-"], capture_output=True, text=True, check=False
    ).stdout.split()
    return newest_source_of(names)


def newest_source_of(names: list[str]) -> str:
    """The newest of the packages that is a kernel's source. Raises ``ConfigError`` if none is."""
    found = [
        ((int(match[1]), int(match[2])), name)
        for name in names
        if (match := _SOURCE_PACKAGE.match(name))
    ]
    found = [item for item in found if item[0] >= _OLDEST]
    if not found:
        raise ConfigError(
            "apt offers no linux-source package of 6.1 or newer: run `apt-get update` as root first"
        )
    return max(found)[1]


def _source_tree(package: str, root: str, progress: Progress) -> str:
    """The unpacked source of a package, in the cache; the newest build of it that apt has."""
    shown = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", package],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    match = re.search(r"^Version: (\S+)$", shown, re.MULTILINE)
    target = os.path.join(root, f"{package}_{match[1] if match else 'unknown'}".replace(":", "_"))
    if os.path.isfile(os.path.join(target, "Makefile")):
        return target
    with tempfile.TemporaryDirectory(prefix="new-", dir=root) as folder:
        path = download(package, folder, progress)
        with deb.open_data(path) as archive:
            member = next((m for m in archive if re.search(r"\.tar\.xz$", m.name)), None)
            stream = archive.extractfile(member) if member is not None else None
            if member is None or stream is None:
                raise ConfigError(f"{path}: package holds no source archive")
            with open(os.path.join(folder, "source.tar.xz"), "wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
        os.unlink(path)
        _unpack_source(folder, progress)
        (top,) = (name for name in os.listdir(folder) if name.startswith("linux-source"))
        os.rename(os.path.join(folder, top), target)
    return target


def _unpack_source(folder: str, progress: Progress) -> None:
    """Unpacks source.tar.xz; tar and xz are separate processes, and so use two CPUs."""
    archive = os.path.join(folder, "source.tar.xz")
    total = os.path.getsize(archive)
    with (
        open(archive, "rb") as packed,
        subprocess.Popen(
            ["tar", "-xJf", "-", "--no-same-owner"], cwd=folder, stdin=subprocess.PIPE
        ) as process,
    ):
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            while chunk := packed.read(1 << 20):
                process.stdin.write(chunk)
                progress("unpacking the source", packed.tell(), total)
        process.stdin.close()
    if process.returncode:
        raise HostError(f"{archive}: tar fails with status {process.returncode}")


def _version(source: str) -> tuple[int, ...]:
    """(6, 12, 117) of the source's Makefile."""
    text = _read(os.path.join(source, "Makefile"))
    numbers = [
        re.search(rf"^{name} = (\d+)", text, re.MULTILINE)
        for name in ("VERSION", "PATCHLEVEL", "SUBLEVEL")
    ]
    if None in numbers:
        raise ConfigError(f"{source}: not a kernel's source")
    return tuple(int(number[1]) for number in numbers if number is not None)


def _key(source: str, wanted: dict[str, str]) -> str:
    """A hash of all that makes the kernel what it is: source, configuration, compiler."""
    compiler = subprocess.run(["gcc", "--version"], capture_output=True, check=True).stdout
    parts = [os.path.basename(source).encode(), compiler.split(b"\n")[0]]
    parts += (f"{symbol}={value}".encode() for symbol, value in sorted(wanted.items()))
    return hashlib.blake2b(b"\n".join(parts), digest_size=12).hexdigest()


def _configure(source: str, output: str, wanted: dict[str, str]) -> None:
    lines = [f"{s}={v}" if v != "n" else f"# {s} is not set" for s, v in wanted.items()]
    fragment = os.path.join(output, "microvm.config")
    with open(fragment, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    command = [*_MAKE, "-s", "-C", source, f"O={output}", f"KCONFIG_ALLCONFIG={fragment}"]
    done = subprocess.run(
        [*command, "allnoconfig"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise HostError(f"kernel configuration failed: {_last_error(done.stderr)}")
    lost = lost_lines(wanted, _read(os.path.join(output, ".config")))
    if lost:
        raise ConfigError(f"{fragment_dir()}: Kconfig did not keep {', '.join(lost)}")


def _compile(source: str, output: str, jobs: int, progress: Progress) -> None:
    """Runs make; its output goes to build.log, a line of which is a step of the bar."""
    path = os.path.join(output, "build.log")
    command = [*_MAKE, "-C", source, f"O={output}", f"-j{jobs}", "vmlinux"]
    with (
        open(path, "w", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for step, line in enumerate(process.stdout):
                log.write(line)
                progress("compiling", min(step, _STEPS - 1), _STEPS)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # compilers too: ours is the only session
            raise
    if process.returncode:
        raise HostError(f"kernel build failed: {_last_error(_read(path))} (all of it: {path})")
    progress("compiling", _STEPS, _STEPS)


def _last_error(text: str) -> str:
    errors = [line for line in text.splitlines() if "rror" in line] or text.splitlines()
    return errors[0].strip() if errors else "no message"


def _store(output: str, key: str) -> StoredKernel:
    """Stores what was built and drops its object files."""
    image = os.path.join(output, "vmlinux")
    release = _read(os.path.join(output, "include/config/kernel.release")).strip()
    files = install.from_files(image, config=os.path.join(output, ".config"))
    kernel = install.install(release, BUILT, files | {"key": key.encode("ascii")})
    shutil.rmtree(output)
    return kernel


def _beside(kernel: StoredKernel, name: str) -> str:
    return os.path.join(os.path.dirname(kernel.path), name)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""
