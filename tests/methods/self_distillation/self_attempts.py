"""A tiny student that writes attempts, and a trainer of it as its own teacher."""

from dataclasses import replace
from typing import Any

import torch
from loopback import source
from transformers import TrainingArguments

from kdlm import OnPolicyTrainer
from kdlm.data import Collator, ContextCollator, ContextSection, Reprompt
from kdlm.rollouts import RolloutSection
from kdlm.signal import IGNORE_INDEX
from kdlm.teachers import SelfTeacher


class Ends:
    """Wraps an engine: what was cut ends with the end token instead, but for every fifth."""

    def __init__(self, engine: Any, end: int):
        self.engine, self.end, self.lives = engine, end, engine.lives

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, prompts: Any, sampling: Any, seed: int) -> list[Any]:
        return [
            one if one.stop == "end" or number % 5 == 4 else replace(one, ids=[*one.ids[:-1], self.end], stop="end")
            for number, one in enumerate(self.engine.generate(prompts, sampling, seed))
        ]


def even(texts: Any, rows: Any) -> list[float]:
    """Right are texts of an even number of letters."""
    return [float(len(text) % 2 == 0) for text in texts]


def trainer(
    tmp_path: Any,
    method: Any,
    teacher: Any = None,
    *,
    reward: Any = even,
    samples: int = 1,
    environment: Any = None,
    layout: Any = "padded",
    columns: Any = None,
    rollouts: Any = None,
    data: bool = False,
    **options: Any,
) -> Any:
    student = source("code-student-tiny")
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(5, 500, (8 if data else 4,), generator=generator).tolist() for _ in range(6)]
    rows = [
        {"input_ids": ids, "labels": [IGNORE_INDEX] * 4 + ids[4:], "index": number, "asked": '{"prompt": "x = "}'}
        | (columns(number) if columns else {})
        for number, ids in enumerate(prompts)
    ]
    arguments = {
        "output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "max_steps": 6, "learning_rate": 1e-2,
        "per_device_train_batch_size": 6, "lr_scheduler_type": "constant", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "max_grad_norm": 0.0,
    }  # fmt: skip
    made = OnPolicyTrainer(
        student.load().double(),
        teacher if teacher is not None or "teacher" not in method.needs else SelfTeacher("average", decay=0.95),
        TrainingArguments(**arguments | options),
        method=method,
        train_dataset=rows,
        processing_class=student.tokenizer(),
        data_collator=ContextCollator(Collator(0, layout=layout), Reprompt(student.tokenizer(), ContextSection())),
        rollouts=RolloutSection(
            sampling={"max_new_tokens": 6, "samples_per_prompt": samples}, environment=environment, **rollouts or {}
        ),
        reward=reward,
    )
    made.networks.to(torch.float64)
    tokenizer: Any = made.processing_class
    made.rounds.engine = Ends(made.rounds.engine, tokenizer.eos_token_id)
    return made


def weights(made: Any) -> dict[str, torch.Tensor]:
    """Train, and return what the student became."""
    made.train()
    made.close()
    return {name: p.detach().clone() for name, p in made.student.named_parameters()}


def seen(made: Any) -> list[dict[str, Any]]:
    """Train, and return every batch that the method saw."""
    batches: list[dict[str, Any]] = []
    losses = made.method.losses
    made.method.losses = lambda nets, batch, *rest: batches.append(batch) or losses(nets, batch, *rest)
    made.train()
    made.close()
    return batches
