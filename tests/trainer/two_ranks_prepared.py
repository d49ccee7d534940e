"""One rank of `test_two_ranks_train_on_the_same_rows_made_once`; started by `forks.on_ranks`."""

import os
import sys
from pathlib import Path

import torch
from test_preparation import ROWS, Drawn
from torch import nn
from transformers import TrainingArguments

from kdlm import DistillTrainer

torch.set_num_threads(1)
folder = Path(sys.argv[1])
args = TrainingArguments(
    output_dir=str(folder / "run"),
    report_to="none",
    use_cpu=True,
    max_steps=2,
    per_device_train_batch_size=3,
    save_strategy="no",
    disable_tqdm=True,
    seed=3,
)
torch.manual_seed(3)
trainer = DistillTrainer(nn.Linear(1, 1), None, args, method=Drawn(), train_dataset=ROWS)
trainer.train()
for number in range(len(trainer.method.seen)):
    (folder / f"made-{args.process_index}").write_text(str(number))
rows = trainer.accelerator.gather(trainer.train_dataset.columns["made"][None])
assert torch.equal(rows[0], rows[1]), "the ranks hold different rows"
trainer.accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # see two_ranks.py
