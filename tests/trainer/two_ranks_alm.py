"""One rank of `test_two_ranks_one_of_them_without_a_chunk_equal_one_process`; started by `forks.on_ranks`."""

import os
import sys
from pathlib import Path

import torch
from readers import reader
from safetensors.torch import save_file
from test_alm_invariance import METHODS, rank_rows
from tiny_models import tiny_model
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments
from two_tokenizers import OURS, THEIRS, pair_collator

from kdlm import DistillTrainer


class InOrder(DistillTrainer):
    """Rows in their order: rank 0 gets those with chunks, rank 1 the others."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


torch.set_num_threads(1)
folder = Path(sys.argv[1])
args = TrainingArguments(
    output_dir=str(folder / "ranks"),
    report_to="none",
    use_cpu=True,
    max_steps=2,
    per_device_train_batch_size=4,
    learning_rate=0.1,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    save_strategy="no",
    disable_tqdm=True,
    seed=3,
)
rows = rank_rows()
trainer = InOrder(
    tiny_model(1, vocab=len(reader(OURS))).double(),
    tiny_model(2, hidden=24, layers=3, vocab=len(reader(THEIRS))).double(),
    args,
    method=METHODS["chunks"](),
    train_dataset=[*rows[0::2], *rows[1::2]],  # a rank takes whole batches in turn
    data_collator=pair_collator(),
)
trainer.train()
if trainer.is_world_process_zero():
    save_file(
        {name: p.detach().contiguous() for name, p in trainer.student.named_parameters()},
        folder / "weights.safetensors",
    )
trainer.accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # see two_ranks.py
