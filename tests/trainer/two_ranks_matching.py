"""One rank of `test_two_ranks_take_the_steps_of_one_process`, by `forks.on_ranks`: writes what rank 0 ends with."""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from matching_runs import SECTIONS, trainer, weights
from safetensors.torch import save_file
from transformers import TrainingArguments

torch.set_num_threads(1)
folder, name = Path(sys.argv[1]), sys.argv[2]
arguments = partial(
    TrainingArguments,
    output_dir=str(folder / "ranks"),
    report_to="none",
    use_cpu=True,
    learning_rate=0.1,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    save_strategy="no",
    logging_nan_inf_filter=False,
    disable_tqdm=True,
    seed=3,
)
run = trainer(arguments, SECTIONS[name].build([], None), max_steps=4, per_device_train_batch_size=4)
run.train()
state = run.method.state_dict()
for key, value in state.items():
    both = run.accelerator.gather(value[None])
    assert torch.equal(both[0], both[1]), f"the ranks hold different {key}: {both.tolist()}"
if run.is_world_process_zero():
    save_file({**weights(run), **{f"state.{key}": value.contiguous() for key, value in state.items()}}, folder / "end")
run.accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # on a busy machine a rank may abort in its teardown ("terminate called"), with all of its work done
