"""transformers hears of DAQ when it loads its own quantizers, which takes it a while, and not before."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.quantizers.auto"


class _WhenLoaded(MetaPathFinder):
    """Finds the registry as others would have, once, and registers after it was executed."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _REGISTRY or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    from . import hub_transformers  # noqa: F401


if _REGISTRY in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenLoaded())
