"""Teach transformers about lorq folders, and peft about their layers, without anyone importing lorq.

`import torch` calls `register` (entry-point group ``torch.backends``). It must cost next to nothing and must
import neither, so it only leaves a note: when ``transformers.quantizers.auto`` is imported, by whomever,
`lorq.runtime.hf` is imported right after it and registers itself; likewise with peft.
"""

import importlib.util
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# What is imported right after which module.
_WATCHED = {"transformers.quantizers.auto": "lorq.runtime.hf", "peft.tuners.lora.model": "lorq.runtime.lora"}


def register() -> None:
    """Register with transformers and peft now if they are loaded, or else when they will be. Safe to call twice."""
    for name in [name for name in _WATCHED if name in sys.modules]:
        import_module(_WATCHED[name])
    waiting = {name for name in _WATCHED if name not in sys.modules}
    if waiting and not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(waiting))


class _Watcher(MetaPathFinder):
    """Finds nothing itself; wraps the loaders of the modules that it waits for, and leaves after the last."""

    def __init__(self, waiting: set[str]):
        self._waiting = waiting

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        self._waiting.remove(fullname)  # first, for the others are asked through the same door
        if not self._waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, _WATCHED[fullname])
        return spec


class _ThenRegister(Loader):
    """Runs the real loader, then registers."""

    def __init__(self, loader: Any, ours: str):
        self._loader, self._ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        # If it is lorq.runtime.hf that imports transformers, this gives back the half-made module, which goes on.
        import_module(self._ours)

    def __getattr__(self, name: str) -> Any:
        # Resource readers and debuggers ask the loader for more; the real one answers.
        return getattr(self._loader, name)
