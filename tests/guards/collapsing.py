"""Methods that collapse a student on purpose, and small guarded runs."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from kdlm import DistillTrainer, OnPolicyTrainer
from kdlm.guards import GuardsSection
from kdlm.losses import CrossEntropy, kept_rows
from kdlm.methods import LogitKD, Step, Term, Terms
from kdlm.models import Lora, adapt
from kdlm.rollouts import RolloutSection, Sampling

VOCAB, END = 31, 0


def log_probs(nets: Any, batch: Any) -> torch.Tensor:
    signal = nets["student"](batch, kept_rows(batch["labels"]))
    return log_softmax(signal.head.logits(signal.hidden), -1)


class Minimised(LogitKD):
    """Minimises the student's entropy and nothing else."""

    needs = frozenset({"labels"})

    def losses(self, nets, batch, active, step: Step) -> Terms:
        log_p = log_probs(nets, batch)
        return Terms({"entropy": Term(-(log_p.exp() * log_p).sum())})


class Paid(LogitKD):
    """Pays the student for one token at every place of its own text."""

    needs = frozenset({"rollouts"})

    def __init__(self, token: int):
        super().__init__([CrossEntropy()])
        self.token = token

    def text(self, step: Step, draw: float) -> Any:
        return "student"

    def losses(self, nets, batch, active, step: Step) -> Terms:
        log_p = log_probs(nets, batch)
        return Terms({"paid": Term(-log_p[:, self.token].sum())})


def model(lora: Lora | None = None) -> Any:
    """A student of a few thousand weights, with dropout in its attention."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["attention_dropout"] = 0.1
    made = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, eos_token_id=END, bos_token_id=1, pad_token_id=END, **sizes))
    return made if lora is None else adapt(made, lora)


def rows(count: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, VOCAB, (6 + number % 3,), generator=generator).tolist() for number in range(count)]
    return [{"input_ids": each, "labels": [-100, -100, *each[2:]]} for each in ids]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "max_steps": 60, "learning_rate": 0.01, "per_device_train_batch_size": 4, "save_strategy": "no", "seed": 3,
        "logging_steps": 20, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **defaults | options
    )


def guarded(
    folder: Path, section: GuardsSection | None, method: Any = None, student: Any = None, teacher: Any = None, **options
) -> DistillTrainer:
    """A run on given text, by default of cross-entropy."""
    method = LogitKD([CrossEntropy()]) if method is None else method
    student = model() if student is None else student
    run = DistillTrainer(student, teacher, args=arguments(folder, **options), method=method, train_dataset=rows())
    if section is not None:
        run.guard(section)
    return run


def writing(folder: Path, section: GuardsSection, method: Any, **options: Any) -> OnPolicyTrainer:
    """A run on the student's own text."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({str(n): n for n in range(VOCAB)}, unk_token="0"))
    run = OnPolicyTrainer(
        model(), args=arguments(folder, **options), method=method, train_dataset=rows(),
        rollouts=RolloutSection(sampling=Sampling(max_new_tokens=12)), reward=None,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0"),
    )  # fmt: skip
    run.guard(section)
    return run


def looks(run: Any, name: str) -> dict[int, float]:
    """Return what was logged of a watched figure, by step."""
    return {line["step"]: line[f"guard/{name}"] for line in run.state.log_history if f"guard/{name}" in line}


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.student.state_dict().items()}
