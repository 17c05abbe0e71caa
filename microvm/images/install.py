"""Puts a kernel into the store, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping

from microvm.boot.kernel import load_kernel
from microvm.errors import ConfigError, HostError
from microvm.images.kernels import MODULES, MODULES_LIST, StoredKernel, store_dir
from microvm.images.modules import Module, ModuleTree, select_modules


def from_files(
    image: str, *, config: str | None = None, tree: ModuleTree | None = None
) -> dict[str, bytes]:
    """The files of a stored kernel, read from the host's."""
    files = {_image_name(image): _read(image)}
    if config is not None and os.path.isfile(config):
        files["config"] = _read(config)
    if tree is not None:
        files |= module_files(select_modules(tree))
    return files


def module_files(modules: list[Module]) -> dict[str, bytes]:
    """Modules as files of a stored kernel."""
    if not modules:
        return {}
    files = {f"{MODULES}/{module.file_name}": module.data for module in modules}
    names = "".join(f"{module.file_name}\n" for module in modules)
    files[f"{MODULES}/{MODULES_LIST}"] = names.encode("ascii")
    return files


def install(name: str, origin: str, files: Mapping[str, bytes]) -> StoredKernel:
    """Writes a kernel's files under a name, in place of one that was there.

    The image is parsed before it counts, so that what is in the store can be booted and the
    first boot finds it parsed. Raises ``ConfigError`` if it is no kernel, ``HostError`` if the
    disk is full or the store cannot be written.
    """
    if "/" in name or name.startswith(".") or not name.isprintable() or not name:
        raise ConfigError(f"kernel name {name!r}: use letters, digits, dots and dashes")
    folder = os.path.join(store_dir(), origin)
    target = os.path.join(folder, name)
    image = next(file for file in files if file.startswith("vmlinu"))
    temporary = None
    try:
        os.makedirs(folder, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=".new-", dir=folder)
        os.chmod(temporary, 0o755)
        for file, data in files.items():
            path = os.path.join(temporary, file)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as stream:
                stream.write(data)
        load_kernel(os.path.join(temporary, image))
        if os.path.isdir(target):
            os.rename(target, temporary + ".old")
        os.rename(temporary, target)
    except OSError as error:
        raise HostError(f"{target}: cannot store kernel: {error.strerror}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(temporary + ".old", ignore_errors=True)
    path = os.path.join(target, image)
    load_kernel(path)
    return StoredKernel(name=name, origin=origin, path=path)


def _image_name(path: str) -> str:
    return "vmlinux" if _read(path, 4) == b"\x7fELF" else "vmlinuz"


def _read(path: str, size: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}") from error
