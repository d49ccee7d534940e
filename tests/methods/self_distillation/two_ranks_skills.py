"""One rank of `test_ranks_share_one_bank_of_skills`; writes weights of rank 0, and each rank's bank."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from self_attempts import Ends, trainer

from kdlm.methods import SkillSD
from kdlm.rollouts import Sampling
from kdlm.teachers import SelfTeacher


class AllEnd(Ends):
    """Whichever rank asks, at whatever place in its batch."""

    def generate(self, prompts: Any, sampling: Any, seed: int) -> list[Any]:
        drawn = self.engine.generate(prompts, sampling, seed)
        return [replace(one, ids=[*one.ids[:-1], self.end], stop="end") for one in drawn]


torch.set_num_threads(1)
folder, size = Path(sys.argv[1]), int(sys.argv[2])
made = trainer(
    folder / "run", SkillSD(weight=1.0, success=0.5), SelfTeacher("current"), samples=2, max_steps=4, optim="sgd",
    environment={"name": "retry", "turns": 3, "ask": "wrong: again", "reward": "sum"}, learning_rate=0.5,
    per_device_train_batch_size=size, reward=lambda texts, rows: [len(text) % 3 / 2 for text in texts],
)  # fmt: skip
greedy = Sampling(temperature=0, max_new_tokens=6, samples_per_prompt=2)
made.section = made.rounds.section = made.section.model_copy(update={"sampling": greedy})
made.rounds.engine = AllEnd(made.rounds.engine.engine, made.processing_class.eos_token_id)
made.train()
(folder / f"bank-{made.args.process_index}").write_bytes(made.method.bank.written())
if made.is_world_process_zero():
    save_file({name: p.detach().contiguous() for name, p in made.student.named_parameters()}, folder / "weights")
made.accelerator.wait_for_everyone()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # on a busy machine a rank may abort in its teardown, with all of its work done
