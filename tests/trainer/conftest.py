"""What the tests of the trainer share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """TrainingArguments for a few plain steps on a CPU."""

    def make(**options: Any) -> TrainingArguments:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "report_to": "none",
            "use_cpu": True,
            "max_steps": 1,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 4,
            "learning_rate": 0.1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
            "seed": 3,
        }
        return TrainingArguments(**{**defaults, **options})

    return make
