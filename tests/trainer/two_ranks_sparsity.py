"""One rank of `test_two_ranks_have_one_mask_and_end_as_one_process`, by `forks.on_ranks`: writes how rank 0 ends."""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import rows, tiny_model
from transformers import TrainingArguments

from kdlm import DistillTrainer
from kdlm.losses import CrossEntropy, ForwardKL
from kdlm.methods import SquareHead
from kdlm.sparsity import SparsitySection

torch.set_num_threads(1)
folder, criterion = Path(sys.argv[1]), sys.argv[2]
world = int(os.environ.get("WORLD_SIZE", "1"))
arguments = partial(
    TrainingArguments,
    report_to="none",
    use_cpu=True,
    learning_rate=0.05,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=1.0,
    save_strategy="no",
    logging_nan_inf_filter=False,
    disable_tqdm=True,
    seed=3,
)
run = DistillTrainer(
    tiny_model(1).double(), tiny_model(1).double(),
    arguments(output_dir=str(folder / f"of{world}"), max_steps=4, per_device_train_batch_size=8 // world),
    method=SquareHead([ForwardKL(), CrossEntropy(weight=0.5)]), train_dataset=rows([5, 11, 3, 17, 8, 2, 13, 9]),
)  # fmt: skip
schedule = {"name": "cubic", "end": 0.8, "every": 1}
run.sparsify(SparsitySection(share=0.7, criterion=criterion, schedule=schedule))
run.train()
assert run.accelerator.num_processes == world
for name, mask in run.sparsity.masks.items():
    every = run.accelerator.gather(mask[None])
    assert len(every) == world and all(torch.equal(one, mask) for one in every), (
        f"the ranks have different masks: {name}"
    )
    assert mask.float().mean().item() == round(0.7 * mask.numel()) / mask.numel()
if run.is_world_process_zero():
    save_file({name: p.detach().contiguous() for name, p in run.student.named_parameters()}, folder / f"end-{world}")
run.accelerator.wait_for_everyone()
if world > 1:
    torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # on a busy machine a rank may abort in its teardown ("terminate called"), with all of its work done
