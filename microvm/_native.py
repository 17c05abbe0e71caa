"""The compiled module. This is its only importer: all else imports `ffi` and `lib` from here.

`MICROVM_NATIVE` may name a directory with another build (the one with sanitizers) to load
instead of the package's own.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

_NAME = "_native_ext"


def _load() -> ModuleType:
    elsewhere = os.environ.get("MICROVM_NATIVE")
    if elsewhere is None:
        return import_module(f"microvm.{_NAME}")
    path = Path(elsewhere) / f"{_NAME}.abi3.so"
    spec = spec_from_file_location(_NAME, path, loader=ExtensionFileLoader(_NAME, str(path)))
    if spec is None or spec.loader is None:
        raise ImportError(f"MICROVM_NATIVE: no extension module at {path}")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_module = _load()
ffi: Any = _module.ffi
lib: Any = _module.lib
