"""Teach transformers about lorq folders without anyone importing lorq.

`import torch` calls `register` (entry-point group ``torch.backends``). It must cost next to nothing and must
not import transformers, so it only leaves a note: when ``transformers.quantizers.auto`` is imported, by
whomever, `lorq.runtime.hf` is imported right after it and registers itself.
"""

import importlib.util
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WATCHED = "transformers.quantizers.auto"


def register() -> None:
    """Register with transformers now if it is loaded, or else when it will be. Safe to call twice."""
    if _WATCHED in sys.modules:
        import_module("lorq.runtime.hf")
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Finds nothing itself; wraps the loader of one module and then leaves."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Runs the real loader, then registers."""

    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        # If it is lorq.runtime.hf that imports transformers, this gives back the half-made module, which goes on.
        import_module("lorq.runtime.hf")

    def __getattr__(self, name: str) -> Any:
        # Resource readers and debuggers ask the loader for more; the real one answers.
        return getattr(self._loader, name)
