"""What PID 1 makes of a guest: file systems, devices, loopback, roots, modules, the end.

Rerun one: .venv/bin/python -m pytest tests/guest/test_init.py -k NAME
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import microvm
from microvm import session as sp
from microvm.errors import ConfigError
from microvm.images.initramfs import find_busybox
from microvm.images.kernels import default_kernel, list_kernels, modules_for

APPLETS = ("sh", "cat", "mount", "touch", "id", "sync", "poweroff", "grep", "sleep")


@pytest.fixture(scope="module", autouse=True)
def kernel() -> str:
    try:
        return default_kernel().path
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def vm() -> Iterator[microvm.Machine]:
    """A guest that tests share."""
    with microvm.Machine(accel="dbt", boot_timeout=60) as machine:
        machine.start()
        yield machine


def sh(vm: microvm.Machine, script: str, **options: object) -> str:
    """What a script in the guest prints; it must succeed."""
    done = vm.run(["sh", "-c", script], capture_output=True, timeout=30, **options)
    assert done.stdout is not None
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout.decode().strip()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An ext4 image with busybox and a user bob of group wheel."""
    mke2fs = shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if mke2fs is None:
        pytest.skip("this host has no mke2fs to make an image with")
    tree = tmp_path / "tree"
    for folder in ("bin", "dev", "proc", "sys", "tmp", "run", "etc", "root", "home/bob"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(find_busybox(), tree / "bin/busybox")
    for name in APPLETS:
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "etc/passwd").write_text(
        "root:x:0:0::/root:/bin/sh\nbob:x:1000:1000::/home/bob:/bin/sh\n"
    )
    (tree / "etc/group").write_text("root:x:0:\nbob:x:1000:\nwheel:x:10:bob\n")
    path = tmp_path / "root.img"
    subprocess.run([mke2fs, "-q", "-t", "ext4", "-d", tree, path, "16M"], check=True)
    return path


def root_of(image: Path, script: str, **options: object) -> str:
    with microvm.Machine(accel="dbt", root=str(image), boot_timeout=60, **options) as machine:
        return sh(machine, script)


def test_init_mounts_what_programs_need(vm: microvm.Machine) -> None:
    mounts = dict(line.split()[1:3] for line in sh(vm, "cat /proc/mounts").splitlines())
    wanted = {
        "/proc": "proc",
        "/sys": "sysfs",
        "/dev": "devtmpfs",
        "/dev/pts": "devpts",
        "/sys/fs/cgroup": "cgroup2",
    }
    assert wanted.items() <= mounts.items()


@pytest.mark.parametrize("link", ["/dev/fd", "/dev/stdin", "/dev/stdout", "/dev/stderr"])
def test_init_links_descriptors(vm: microvm.Machine, link: str) -> None:
    assert sh(vm, f"test -L {link} && echo yes") == "yes"


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm", "/run", "/var/tmp"])
def test_init_writable_places_are(vm: microvm.Machine, folder: str) -> None:
    user = "" if folder == "/run" else "nobody"
    assert sh(vm, f"touch {folder}/$$ && echo yes", user=user, cwd="/") == "yes"


def test_init_applets_are_programs_by_path(vm: microvm.Machine) -> None:
    assert sh(vm, "/usr/bin/env true && /sbin/ip -V >&2; /bin/ls /bin/awk") == "/bin/awk"


def test_init_loopback_carries_connections(vm: microvm.Machine) -> None:
    script = "echo over | nc -l -p 7 & sleep 0.2; nc 127.0.0.1 7 </dev/null"
    assert sh(vm, script) == "over"


def test_init_descriptor_limit_is_usual(vm: microvm.Machine) -> None:
    assert sh(vm, "ulimit -Sn; ulimit -Hn").split() == ["1024", "1048576"]


def test_init_survives_signals_it_does_not_want(vm: microvm.Machine) -> None:
    assert sh(vm, "kill -HUP 1; kill -SEGV 1; kill -KILL 1; kill -PIPE 1; echo alive") == "alive"


def test_root_image_has_its_users(image: Path) -> None:
    with microvm.Machine(accel="dbt", root=str(image), boot_timeout=60) as machine:
        done = machine.run(["id"], user="bob", capture_output=True, timeout=30)
    assert done.stdout == b"uid=1000(bob) gid=1000(bob) groups=10(wheel)\n"


def test_root_image_read_only_is_not_written(image: Path) -> None:
    before = image.read_bytes()
    script = "touch /x 2>/dev/null || echo refused; touch /tmp/x && echo tmp"
    assert root_of(image, script, root_readonly=True).split() == ["refused", "tmp"]
    assert image.read_bytes() == before


def test_root_image_under_overlay_keeps_writes_in_memory(image: Path) -> None:
    options = {"root_readonly": True, "cmdline": "microvm.rootmode=overlay"}
    assert root_of(image, "echo new > /etc/group && cat /etc/group", **options) == "new"
    assert root_of(image, "grep -c wheel /etc/group", **options) == "1"


def test_root_image_power_off_writes_everything(image: Path) -> None:
    with (
        microvm.Machine(accel="dbt", root=str(image), boot_timeout=60) as machine,
        pytest.raises(microvm.GuestGoneError),
    ):
        machine.run(["sh", "-c", "echo kept > /kept; poweroff; sleep 30"], timeout=30)
    assert root_of(image, "cat /kept") == "kept"


def test_root_image_damaged_fails_boot(tmp_path: Path) -> None:
    image = tmp_path / "damaged.img"
    image.write_bytes(bytes(1080) + b"\x53\xef" + bytes((1 << 20) - 1082))  # ext4's magic alone
    with (
        pytest.raises(microvm.GuestError) as caught,
        microvm.Machine(accel="dbt", root=str(image), boot_timeout=60) as machine,
    ):
        machine.run(["true"], timeout=30)
    assert "cannot mount root /dev/vda" in caught.value.console


def test_host_name_is_the_one_asked_for() -> None:
    with microvm.Machine(accel="dbt", cmdline="microvm.hostname=box", boot_timeout=60) as machine:
        assert sh(machine, "hostname") == "box"


def test_modules_load_when_the_kernel_asks() -> None:
    """A stock kernel's overlay is a module: mounting it calls modprobe."""
    stock = [k for k in list_kernels() if any("overlay" in m for m in modules_for(k.path))]
    if not stock:
        pytest.skip("no kernel with modules in the store: microvm kernel pull")
    with microvm.Machine(accel="dbt", kernel=stock[0].name, boot_timeout=120) as machine:
        script = (
            "! grep -q ^overlay /proc/modules && mkdir -p /tmp/l /tmp/u /tmp/w /tmp/m && mount -t"
            " overlay o -o lowerdir=/tmp/l,upperdir=/tmp/u,workdir=/tmp/w /tmp/m && echo mounted"
        )
        assert sh(machine, script) == "mounted"


def test_agent_streams_of_strangers_do_no_harm(vm: microvm.Machine) -> None:
    """Garbage on the agent's port ends that stream, and nothing else."""
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(20)
        vm._open_stream(sp.VSOCK_AGENT_PORT, b"GET / HTTP/1.0\r\n\r\n", far.fileno(), far.fileno())
        far.close()
        assert near.recv(1) == b""
    assert sh(vm, "echo on") == "on"
