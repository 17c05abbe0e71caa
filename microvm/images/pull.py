"""``kernel pull``: the distribution's stock kernel, through its package manager and without root.

``apt-get download`` puts a package into a directory of ours, checked by apt's own signatures; we
read the image and the modules from it. Debian offers a cloud kernel, made for virtual machines;
Ubuntu keeps its modules in a package beside. Where there is no apt, the host's own kernel serves.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable

from microvm._record import Record
from microvm.boot.kernel import load_kernel
from microvm.errors import ConfigError, HostError
from microvm.images import deb, install
from microvm.images.kernels import HOST, PULLED, StoredKernel
from microvm.images.modules import ModuleArchive, ModuleTree, select_modules

#: Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

#: Flavours from the best on: made for virtual machines, then everything.
_FLAVOURS = ("cloud-amd64", "kvm", "virtual", "amd64", "generic")
_PACKAGE = re.compile(
    r"linux-image-(?P<release>(?P<version>[0-9]+\.[0-9]+[^-]*(-[0-9]+)?)"
    rf"-(?P<flavour>{'|'.join(_FLAVOURS)}))$"
)


class Candidate(Record):
    """A package with a kernel."""

    package: str
    release: str  #: what uname -r says: 6.12.9+deb12-cloud-amd64
    version: tuple[int, ...]
    flavour: int  #: index in _FLAVOURS


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress is shown."""


def pull_kernel(version: str | None = None, progress: Progress = _silent) -> StoredKernel:
    """Fetches a stock kernel, the newest cloud kernel unless ``version`` begins another's release.

    Without apt the host's own kernel is copied. Raises ``ConfigError`` if there is no such
    kernel, ``HostError`` if it cannot be fetched or stored.
    """
    if shutil.which("apt-get") is None or shutil.which("apt-cache") is None:
        return copy_host_kernel(version)
    candidate = choose(list_candidates(), version)
    with tempfile.TemporaryDirectory(prefix="microvm-pull-") as folder:
        files = _fetch_files(candidate, folder, progress)
    progress("storing", 0, 1)
    kernel = install.install(candidate.release, PULLED, files)
    progress("storing", 1, 1)
    return kernel


def list_candidates() -> list[Candidate]:
    """All kernel packages that apt offers."""
    try:
        names = subprocess.run(
            ["apt-cache", "pkgnames", "linux-image-"], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(f"apt-cache does not work here: {error}") from error
    return parse_candidates(names)


def parse_candidates(names: list[str]) -> list[Candidate]:
    """The packages among ``names`` that hold a signed kernel for us."""
    return [
        Candidate(
            package=name,
            release=match["release"],
            version=tuple(int(number) for number in re.findall(r"\d+", match["version"])),
            flavour=_FLAVOURS.index(match["flavour"]),
        )
        for name in names
        if (match := _PACKAGE.match(name)) and re.search(r"\d+\.\d+(\.|-)", match["version"] + "-")
    ]


def choose(candidates: list[Candidate], version: str | None) -> Candidate:
    """The newest of the best flavour, of those whose release begins with ``version``."""
    fitting = [c for c in candidates if version is None or _matches(c.release, version)]
    if not fitting:
        if not candidates:
            raise ConfigError("apt offers no kernel packages: run `apt-get update` as root first")
        known = ", ".join(sorted({".".join(map(str, c.version[:2])) for c in candidates}))
        raise ConfigError(f"apt offers no kernel {version} (versions there are: {known})")
    return max(fitting, key=lambda c: (-c.flavour, c.version))


def _matches(release: str, version: str) -> bool:
    rest = release.removeprefix(version)
    return len(rest) < len(release) and (not rest or not rest[0].isdigit())


def download(package: str, folder: str, progress: Progress) -> str:
    """``apt-get download`` into ``folder``; the package's path. Raises ``HostError``."""
    reader, writer = os.pipe()
    # apt drops to a user of its own where it may; only root could give it this folder
    command = ["apt-get", "-q", "-o", f"APT::Status-Fd={writer}", "-o", "APT::Sandbox::User=root"]
    try:
        process = subprocess.Popen(
            [*command, "download", package],
            cwd=folder,
            pass_fds=[writer],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        os.close(reader)
        raise HostError(f"apt-get does not start: {error.strerror}") from error
    finally:
        os.close(writer)
    with process, open(reader, encoding="utf-8", errors="replace") as status:
        for line in status:  # dlstatus:ITEM:PERCENT:TEXT
            fields = line.split(":")
            if fields[0] == "dlstatus" and len(fields) > 2:
                progress(f"fetching {package}", int(float(fields[2])), 100)
        assert process.stderr is not None
        errors = process.stderr.read()
    found = [name for name in os.listdir(folder) if name.startswith(package + "_")]
    if process.returncode or not found:
        lines = [line for line in errors.splitlines() if line.startswith("E:")]
        reason = lines[0][2:].strip() if lines else f"status {process.returncode}"
        raise HostError(f"apt-get download {package} failed: {reason}")
    progress(f"fetching {package}", 100, 100)
    return os.path.join(folder, found[0])


def _fetch_files(candidate: Candidate, folder: str, progress: Progress) -> dict[str, bytes]:
    """Image, configuration and modules of a package as files for the store."""
    release = candidate.release
    path = download(candidate.package, folder, progress)
    progress(f"unpacking {release}", 0, 1)
    with deb.open_data(path) as archive:
        files = _read_image(archive, release, path)
        modules = select_modules(ModuleArchive(archive))
    progress(f"unpacking {release}", 1, 1)
    if not modules:  # Ubuntu
        path = download(f"linux-modules-{release}", folder, progress)
        with deb.open_data(path) as archive:
            modules = select_modules(ModuleArchive(archive))
    return files | install.module_files(modules)


def _read_image(archive: tarfile.TarFile, release: str, path: str) -> dict[str, bytes]:
    files = {}
    for member in archive:
        name = os.path.basename(member.name)
        if member.isreg() and name in (f"vmlinuz-{release}", f"config-{release}"):
            stream = archive.extractfile(member)
            assert stream is not None  # a regular file has one
            files[name.split("-", 1)[0]] = stream.read()
    if "vmlinuz" not in files:
        raise ConfigError(f"{path}: package holds no vmlinuz-{release}")
    return files


def copy_host_kernel(version: str | None = None, root: str = "/") -> StoredKernel:
    """Copies the host's kernel: the running one, or the newest whose release ``version`` begins.

    Raises ``ConfigError`` if there is none or it cannot be read.
    """
    images = _host_images(root)
    releases = [r for r in images if version is None or _matches(r, version)]
    if not releases:
        wanted = os.path.join(root, "boot", f"vmlinuz-{version}*" if version else "vmlinuz-*")
        raise ConfigError(
            f"{wanted}: no such kernel, and there is no apt to fetch one with:"
            " give a kernel file with --kernel"
        )
    running = os.uname().release
    releases.sort(key=lambda r: (r == running, [int(n) for n in re.findall(r"\d+", r)]))
    image = images[releases[-1]]
    release = load_kernel(image).version or releases[-1]  # a file may be called vmlinuz-linux
    files = install.from_files(
        image,
        config=os.path.join(root, "boot", f"config-{release}"),
        tree=ModuleTree(os.path.join(root, "lib/modules", release)),
    )
    return install.install(release, HOST, files)


def _host_images(root: str) -> dict[str, str]:
    """Release to path: /lib/modules/RELEASE/vmlinuz, which anyone may read, before /boot."""
    places = [
        (os.path.join(root, "boot"), re.compile(r"vmlinuz-(.+)"), ""),
        (os.path.join(root, "lib/modules"), re.compile(r"(\d.*)"), "vmlinuz"),
    ]
    images: dict[str, str] = {}
    for folder, pattern, below in places:
        names = os.listdir(folder) if os.path.isdir(folder) else []
        for name in names:
            path = os.path.join(folder, name, below) if below else os.path.join(folder, name)
            match = pattern.fullmatch(name)
            if match and os.path.isfile(path):
                images[match[1]] = path
    return images
