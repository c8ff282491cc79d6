"""timm hears of the architecture `hf_daq` when it is loaded, transformers of the quantizer `daq` when it loads its own, PEFT
of adapters for quantized layers when it loads its own; huggingface_hub opens quantized models; and libraries get their guards."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from . import guards


class _WhenLoaded(MetaPathFinder):
    """Finds a module as others would have, and calls something after it was executed."""

    def __init__(self, name: str, register: Callable[[], None]) -> None:
        self.name, self.register, self.searching = name, register, False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self.searching = False
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                if self in sys.meta_path:  # a spec may be looked for without being executed
                    sys.meta_path.remove(self)
                execute(module)
                self.register()

            loader.exec_module = execute_and_register
        return spec


def _register_with_timm() -> None:
    from timm.models import register_model

    register_model(hf_daq)


def hf_daq(*args: Any, **kwargs: Any) -> Any:
    """The architecture of timm's factory that rebuilds saved models: `integrations.timm.build`."""
    from .timm import build

    return build(*args, **kwargs)


def _register_with_transformers() -> None:
    from . import transformers  # noqa: F401


def _register_with_hub_mixin() -> None:
    from . import hub_mixin

    hub_mixin.register()


def _register_with_peft() -> None:
    from . import peft_hooks

    peft_hooks.register()


for _name, _register in (
    ("timm", _register_with_timm),
    ("timm.models._manipulate", guards.guard_timm_fusing),
    ("timm.models._builder", guards.guard_timm_loading),
    ("transformers.quantizers.auto", _register_with_transformers),
    ("transformers.modeling_utils", guards.guard_transformers),
    ("peft.peft_model", _register_with_peft),
    ("huggingface_hub.hub_mixin", _register_with_hub_mixin),
    ("huggingface_hub.serialization._torch", guards.guard_hub_loading),
    ("accelerate.utils.modeling", guards.guard_accelerate),
    ("diffusers.models.modeling_utils", guards.guard_diffusers),
    ("torch.nn.utils.fusion", guards.guard_fusion),
    ("ultralytics.nn.tasks", guards.guard_ultralytics),
):
    if _name in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenLoaded(_name, _register))
