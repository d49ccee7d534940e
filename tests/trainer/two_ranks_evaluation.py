"""One rank of `test_two_ranks_read_what_one_process_does`; writes the metrics of rank 0.

`two_ranks_evaluation.py FOLDER distil|plain`: in a `DistillTrainer`, or as a callback of transformers' Trainer.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import rows, tiny_model
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from kdlm import DistillationEvaluation, DistillTrainer
from kdlm.data import Collator
from kdlm.evaluation import EvaluationSection, Generations

torch.set_num_threads(1)
folder, kind = Path(sys.argv[1]), sys.argv[2]
args = TrainingArguments(
    output_dir=str(folder / "ranks"),
    report_to="none",
    use_cpu=True,
    per_device_eval_batch_size=2,
    remove_unused_columns=False,
    disable_tqdm=True,
    seed=3,
)
student, teacher = tiny_model(1).double(), tiny_model(2, hidden=24, layers=3).double()
asked = {"rows": 5, "measures": ["reverse_kl_to_teacher", "teacher_ece"], "start": True, "gap_closed": 6.0}
data = {"eval_dataset": rows([4, 9, 6, 12, 3, 8, 7], seed=7), "data_collator": Collator(0, layout="padded")}
if kind == "plain":
    trainer = Trainer(student, args, **data)
    trainer.add_callback(DistillationEvaluation(trainer, teacher, EvaluationSection(**asked)))
else:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"</s>": 0, **{str(n): n for n in range(1, 61)}}, unk_token="</s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    trainer = DistillTrainer(student, teacher, args, processing_class=tokenizer, **data)
    written = Generations(prompts=3, max_new_tokens=5, prompt_tokens=2)
    trainer.watch(EvaluationSection(**asked, generations=written), other=rows([5, 8, 4], seed=9))
with torch.no_grad():  # so that it is no longer the student of the start
    for parameter in student.parameters():
        parameter.mul_(1.05)
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    timed = ("runtime", "per_second", "preparation_time", "loss")
    kept = {name: value for name, value in metrics.items() if not name.endswith(timed) and isinstance(value, float)}
    save_file(
        {name: torch.tensor(value, dtype=torch.float64) for name, value in kept.items()}, folder / "metrics.safetensors"
    )
trainer.accelerator.wait_for_everyone()
if trainer.args.world_size > 1:
    torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)
