"""One rank of `test_two_ranks_write_and_learn_what_one_process_does`; writes weights and logs of rank 0."""

import json
import os
import sys
from pathlib import Path

import torch
from loopback import source
from safetensors.torch import save_file
from transformers import TrainingArguments

from kdlm import OnPolicyTrainer
from kdlm.losses import JSD
from kdlm.methods import GKD
from kdlm.rollouts import RolloutSection

torch.set_num_threads(1)
folder, size = Path(sys.argv[1]), int(sys.argv[2])
ids = [[5 + n, 9 + 2 * n, 30 + 3 * n, 7, 8 + n] for n in range(32)]
student = source("code-student-tiny")
trainer = OnPolicyTrainer(
    student.load().double(),
    source().load().double(),
    TrainingArguments(
        str(folder / "run"), report_to="none", use_cpu=True, max_steps=6, per_device_train_batch_size=size,
        learning_rate=0.5, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no",
        logging_steps=1, disable_tqdm=True, seed=3,
    ),
    method=GKD([JSD()], student_share=0.5),
    rollouts=RolloutSection(sampling={"max_new_tokens": 6, "temperature": 0}, every=2),
    train_dataset=[{"input_ids": one, "labels": [-100, -100, *one[2:]]} for one in ids],
    processing_class=student.tokenizer(),
)  # fmt: skip
trainer.networks.double()
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
