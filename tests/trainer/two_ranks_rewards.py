"""One rank of `test_two_ranks_learn_what_one_process_does`; writes weights and rewards of rank 0."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from loopback import source
from safetensors.torch import save_file
from trl import GRPOConfig

from kdlm.reward_trainer import TeacherGRPOTrainer


class Told(TeacherGRPOTrainer):
    """Draws nothing: what a completion says depends on its prompt and its place in the group, on whatever rank."""

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        written = [
            [5 + (sum(ids) * 7 + place % 4 * 31 + k * 11) % 400 for k in range(3 + place % 4 % 3)]
            for place, ids in enumerate(prompt_ids)
        ]
        return written, None


torch.set_num_threads(1)
folder, size = Path(sys.argv[1]), int(sys.argv[2])
student = source("code-student-tiny")
trainer = Told(
    student.load(),
    lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
    GRPOConfig(
        str(folder / "run"), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=None, max_steps=3,
        per_device_train_batch_size=size, num_generations=4, learning_rate=0.3, optim="sgd", disable_tqdm=True,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", logging_steps=1, seed=3,
    ),
    teacher=source().load(),
    ratio=0.5,
    train_dataset=Dataset.from_dict({"prompt": [[5 + n, 9 + 2 * n, 30 + 3 * n] for n in range(12)]}),
    processing_class=student.tokenizer(),
)  # fmt: skip
trainer.train()
if trainer.is_world_process_zero():
    tensors = {name: p.detach().contiguous() for name, p in trainer.student.named_parameters()}
    save_file(tensors, folder / "weights.safetensors")
    (folder / "logs.json").write_text(json.dumps([log for log in trainer.state.log_history if "loss" in log]))
trainer.accelerator.wait_for_everyone()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # on a busy machine a rank may abort in its teardown ("terminate called"), with all of its work done
