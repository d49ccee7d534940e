"""Knowledge distillation on the Hugging Face Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdlm.diffusion_trainer import DiffusionTrainer
    from kdlm.evaluation.callback import DistillationEvaluation
    from kdlm.on_policy import OnPolicyTrainer
    from kdlm.recipe import load as load_recipe
    from kdlm.trainer import DistillTrainer

__version__ = "0.1.0"
__all__ = [
    "DiffusionTrainer",
    "DistillTrainer",
    "DistillationEvaluation",
    "OnPolicyTrainer",
    "__version__",
    "load_recipe",
]

LAZY = {
    "DiffusionTrainer": ("kdlm.diffusion_trainer", "DiffusionTrainer"),
    "DistillTrainer": ("kdlm.trainer", "DistillTrainer"),
    "DistillationEvaluation": ("kdlm.evaluation.callback", "DistillationEvaluation"),
    "OnPolicyTrainer": ("kdlm.on_policy", "OnPolicyTrainer"),
    "load_recipe": ("kdlm.recipe", "load"),
}
"""Public names that cost seconds to import, fetched when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
