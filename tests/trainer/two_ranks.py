"""One rank of `test_two_ranks_equal_one_process`; started by `forks.on_ranks`, writes the weights of rank 0.

`two_ranks.py FOLDER [STEPS [ensemble]]`: the teacher is a model, or two of them with learned weights.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import rows, tiny_model
from transformers import TrainingArguments

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.methods import Taid
from kdlm.teachers import Ensemble, Learned, LocalTeacher

torch.set_num_threads(1)
folder = Path(sys.argv[1])
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 1
args = TrainingArguments(
    output_dir=str(folder / "ranks"),
    report_to="none",
    use_cpu=True,
    max_steps=steps,
    per_device_train_batch_size=4,
    learning_rate=0.1,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    save_strategy="no",
    logging_nan_inf_filter=False,
    disable_tqdm=True,
    seed=3,
)
student, teacher = tiny_model(1).double(), tiny_model(2, hidden=24, layers=3).double()
if "ensemble" in sys.argv:
    teacher = Ensemble([LocalTeacher(teacher), LocalTeacher(tiny_model(3).double())], Learned())
method = Taid()
trainer = DistillTrainer(
    student,
    teacher,
    args,
    method=method,
    train_dataset=rows([5, 11, 3, 17, 8, 2, 13, 9]),
    eval_dataset=rows([4, 9, 6], seed=7),
    data_collator=Collator(0, layout="padded"),
)
trainer.train()
metrics = trainer.evaluate()
t = trainer.accelerator.gather(method.t.reshape(1).float())
assert torch.equal(t[0], t[1]), f"the ranks hold different t: {t.tolist()}"
if isinstance(teacher, Ensemble):
    learned = trainer.accelerator.gather(teacher.state_dict()["log_weights"][None])
    assert torch.equal(learned[0], learned[1]), f"the ranks hold different weights: {learned.tolist()}"
if trainer.is_world_process_zero():
    tensors = {name: p.detach().contiguous() for name, p in trainer.student.named_parameters()}
    save_file(tensors, folder / "weights.safetensors")
    values = {name: torch.tensor(value) for name, value in metrics.items() if isinstance(value, float)}
    save_file(values, folder / "metrics.safetensors")
trainer.accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # on a busy machine a rank may abort in its teardown ("terminate called"), with all of its work done
