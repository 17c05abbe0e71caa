"""The files of our small root that are neither programs nor modules."""

from __future__ import annotations

from microvm.images.cpio import Entry, character_device, directory, regular, symlink

_PASSWD = """\
root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
"""
_GROUP = """\
root:x:0:
tty:x:5:
nogroup:x:65534:
"""
_HOSTS = """\
127.0.0.1 localhost microvm
::1 localhost microvm
"""
_NSSWITCH = """\
passwd: files
group: files
hosts: files dns
"""
# The editor of busybox's shell knows \\u, \\h, \\w and \\$ as bash does.
_PROFILE = """\
export PS1='\\u@\\h:\\w\\$ '
alias ll='ls -l'
umask 022
"""


def skeleton() -> list[Entry]:
    """Directories first; /sbin and /usr/bin are /bin, where all programs are."""
    return [
        *map(directory, ("bin", "dev", "etc", "lib", "lib/microvm", "mnt", "proc", "run", "sys")),
        *map(directory, ("usr", "var")),
        directory("root", 0o700),
        directory("tmp", 0o1777),
        symlink("sbin", "bin"),
        symlink("usr/bin", "../bin"),
        symlink("usr/sbin", "../bin"),
        symlink("var/run", "../run"),
        symlink("var/tmp", "../tmp"),
        character_device("dev/console", 5, 1, 0o600),
        regular("etc/passwd", _PASSWD.encode()),
        regular("etc/group", _GROUP.encode()),
        regular("etc/hosts", _HOSTS.encode()),
        regular("etc/nsswitch.conf", _NSSWITCH.encode()),
        regular("etc/profile", _PROFILE.encode()),
        regular("etc/resolv.conf", b""),
        symlink("etc/mtab", "/proc/mounts"),
    ]
