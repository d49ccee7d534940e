"""One rank of a run whose rows ddk draws; started by `forks.on_ranks`, writes weights and shares of rank 0."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import rows, tiny_model
from transformers import TrainingArguments

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.samplers import DomainGaps

torch.set_num_threads(1)
folder, world = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
args = TrainingArguments(
    output_dir=str(folder / "run"),
    report_to="none",
    use_cpu=True,
    max_steps=5,
    per_device_train_batch_size=4 // world,
    learning_rate=0.1,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    save_strategy="no",
    disable_tqdm=True,
    seed=3,
)
made = [{**row, "domain": 9 if n % 3 == 0 else 7} for n, row in enumerate(rows([6 + n % 5 for n in range(24)]))]
teacher = tiny_model(2, hidden=24).double()
student = tiny_model(1).double()
trainer = DistillTrainer(student, teacher, args, train_dataset=made, data_collator=Collator(0, layout="padded"))
trainer.draw(DomainGaps(every=2, held_out=3), names={7: "near", 9: "far"})
trainer.train()
shares = trainer.accelerator.gather(torch.from_numpy(trainer.order.shares)[None])
assert all(torch.equal(shares[0], one) for one in shares), f"the ranks hold different shares: {shares.tolist()}"
if trainer.is_world_process_zero():
    tensors = {name: p.detach().contiguous() for name, p in trainer.student.named_parameters()}
    save_file(tensors, folder / "weights.safetensors")
    lines = [line for line in trainer.state.log_history if any("/" in name for name in line)]
    (folder / "logs.json").write_text(json.dumps(lines))
if world > 1:
    trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)
