"""One rank of `test_two_ranks_write_and_learn_what_one_process_does`; writes weights and logs of rank 0.

`two_ranks_on_policy.py FOLDER ROWS [single | zero3]`: SGD in double precision, or AdamW in single, in shares or not.
"""

import json
import os
import sys
from pathlib import Path

import torch
from loopback import source
from safetensors.torch import save_file
from transformers import TrainingArguments
from zero_cases import shares, zero

from kdlm import OnPolicyTrainer
from kdlm.losses import JSD
from kdlm.methods import GKD
from kdlm.models import whole
from kdlm.rollouts import RolloutSection

torch.set_num_threads(1)
folder, size, single, in_shares = Path(sys.argv[1]), int(sys.argv[2]), len(sys.argv) > 3, sys.argv[3:] == ["zero3"]
kind = torch.float32 if single else torch.float64
moved: dict = {"optim": "sgd", "learning_rate": 0.5}
if single:
    moved = {"optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 1e-4}
ids = [[5 + n, 9 + 2 * n, 30 + 3 * n, 7, 8 + n] for n in range(32)]
student = source("code-student-tiny")
trainer = OnPolicyTrainer(
    student.load().to(kind),
    source().load().to(kind),
    TrainingArguments(
        str(folder / "run"), report_to="none", use_cpu=True, max_steps=6, per_device_train_batch_size=size,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no",
        logging_steps=1, disable_tqdm=True, seed=3, deepspeed=zero(3) if in_shares else None, **moved,
    ),
    method=GKD([JSD()], student_share=0.5),
    rollouts=RolloutSection(sampling={"max_new_tokens": 6, "temperature": 0}, every=2),
    train_dataset=[{"input_ids": one, "labels": [-100, -100, *one[2:]]} for one in ids],
    processing_class=student.tokenizer(),
)  # fmt: skip
trainer.networks.to(kind)
trainer.train()
if in_shares:
    shares(trainer, torch.distributed.get_world_size())
tensors = {name: whole(p).detach().contiguous() for name, p in trainer.student.named_parameters()}
if trainer.is_world_process_zero():
    save_file(tensors, folder / "weights.safetensors")
    (folder / "logs.json").write_text(json.dumps([log for log in trainer.state.log_history if "loss" in log]))
trainer.accelerator.wait_for_everyone()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # on a busy machine a rank may abort in its teardown ("terminate called"), with all of its work done
