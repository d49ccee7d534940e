"""One rank of `test_two_ranks_see_what_one_process_does_and_stop_together`: `two_ranks_guards.py FOLDER`."""

import os
import sys
from pathlib import Path

import torch
from collapsing import Minimised, guarded, looks, model
from safetensors.torch import save_file

from kdlm import checkpoints
from kdlm.guards import GuardsSection, Limit, Watched

torch.set_num_threads(1)
folder = Path(sys.argv[1])
world = int(os.environ.get("WORLD_SIZE", "1"))
section = GuardsSection(
    every=3,
    rows=5,
    entropy=Watched(stop=Limit(below_start=0.3), patience=2),
    kl_to_start=Watched(stop=Limit(above=1e3)),
)
student = model().double()
student.config.attention_dropout = 0.0
for layer in student.model.layers:
    layer.self_attn.attention_dropout = 0.0
options = {"per_device_train_batch_size": 8 // world, "max_grad_norm": 0.0}
run = guarded(folder / "run", section, Minimised([]), student, **options)
run.train()
checkpoints.verify(folder / "run" / f"checkpoint-{run.guards.stopped.step}")
if run.is_world_process_zero():
    found = {name: torch.tensor(list(looks(run, name).values())) for name in ("entropy", "kl_to_start")}
    save_file({**found, "step": torch.tensor(run.state.global_step)}, folder / "looks.safetensors")
run.accelerator.wait_for_everyone()
if world > 1:
    torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)
