"""The small world of `self_distillation_quality.py`: its rows, its trainers in one process, and what is measured.

The world is the sandbox's: `walks-start` solves a quarter of the walks by itself and all of them told the solution, and
also reverses words, on which forgetting is measured (kdlm/sandbox/lessons.py).
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from kdlm import DistillTrainer, OnPolicyTrainer
from kdlm.data import Collator
from kdlm.data.contexts import ContextCollator, ContextSection, Reprompt
from kdlm.losses import chunked, forward_kl, kept_rows
from kdlm.models import Predictor
from kdlm.rollouts import GenerateEngine, GenerateSection, RolloutSection, Sampling
from kdlm.sandbox import build
from kdlm.sandbox.jsonl import read_jsonl
from kdlm.sandbox.walks import right
from kdlm.signal import IGNORE_INDEX

BATCH = 64  # completions, or solutions, of an optimiser step
LONGEST = 8  # tokens of a completion; a walk and its end are 6
WORDS = 300  # held-out words on which forgetting is measured
TEMPLATE = "{context}\n{prompt}"  # as the lessons have it

disable_progress_bar()
torch.set_num_threads(1)

Row = dict[str, Any]
Point = dict[str, float]


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(build("walks-start"))


@cache
def problems(data: str, file: str) -> list[Row]:
    return read_jsonl(build(data) / f"{file}.jsonl")


def opened(name: str) -> Any:
    """Return a walker, fresh."""
    return AutoModelForCausalLM.from_pretrained(build(name), dtype=torch.float32).eval()


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def row(prompt: str, completion: str, **more: Any) -> Row:
    """Return a row that is trained on its completion and the end token."""
    before, after = ids(prompt), [*ids(completion), tokenizer().eos_token_id]
    return {"input_ids": before + after, "labels": [IGNORE_INDEX] * len(before) + after, **more}


def told(walks: Sequence[Row], solutions: Sequence[str]) -> list[Row]:
    """Return rows whose teacher is told a solution."""
    return [
        row(one["prompt"], one["completion"], index=n, asked=json.dumps({"prompt": one["prompt"]}), context=solution)
        for n, (one, solution) in enumerate(zip(walks, solutions, strict=True))
    ]


def told_collator() -> ContextCollator:
    return ContextCollator(plain_collator(), Reprompt(tokenizer(), ContextSection(template=TEMPLATE)))


def plain_collator() -> Collator:
    return Collator(tokenizer().pad_token_id)


def rollouts(samples: int = 1, **options: Any) -> RolloutSection:
    sampling = Sampling(max_new_tokens=LONGEST, samples_per_prompt=samples)
    return RolloutSection(engine=GenerateSection(batch_size=4 * BATCH), sampling=sampling, **options)


def drawn(model: Any, prompts: Sequence[str], *, temperature: float, seed: int = 7, samples: int = 1) -> list[str]:
    """Return completions of the prompts as text."""
    engine = GenerateEngine([tokenizer().eos_token_id], tokenizer().pad_token_id, batch_size=8 * BATCH)
    engine.take(model, 0)
    sampling = Sampling(temperature=temperature, max_new_tokens=LONGEST, samples_per_prompt=samples)
    written = engine.generate([ids(prompt) for prompt in prompts], sampling, seed)
    return tokenizer().batch_decode([one.ids for one in written], skip_special_tokens=True)


def accuracy(model: Any, temperature: float, prompt: Callable[[Row], str] = lambda one: one["prompt"]) -> float:
    """Return the share of held-out walks that the model gets right, in either hand."""
    walks = problems("walks", "eval")
    texts = drawn(model, [prompt(one) for one in walks], temperature=temperature)
    return fmean(right(one["answer"], text) for one, text in zip(walks, texts, strict=True))


def forgetting(start: Any, model: Any) -> float:
    """Return KL(start || model) in nats a token of the other task's held-out completions."""
    words = problems("reversals", "eval")[:WORDS]
    batch: Any = plain_collator()([row(one["prompt"], one["completion"]) for one in words])
    kept = kept_rows(batch["labels"])
    with torch.no_grad():
        return chunked(forward_kl, Predictor(model)(batch, kept), Predictor(start)(batch, kept)).mean().item()


def measured(start: Any, model: Any) -> Point:
    model.eval()
    return {"greedy": accuracy(model, 0.0), "sampled": accuracy(model, 1.0), "forgetting": forgetting(start, model)}


class Curve(TrainerCallback):
    """Measures a student every few steps."""

    def __init__(self, start: Any, student: Any, every: int):
        self.start, self.student, self.every = start, student, every
        self.points: list[Point] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            with torch.random.fork_rng(devices=[]):  # measuring changes nothing of the run
                self.points.append({"step": state.global_step, **measured(self.start, self.student)})
            self.student.train()


def trained(
    student: Any, rows: list[Row], *, steps: int, rate: float, seed: int, every: int, samples: int = 1, **options: Any
) -> list[Point]:
    """Train a student in place and return its curve; a step takes `BATCH` completions, `samples` of each prompt."""
    curve = Curve(opened("walks-start"), student, every)
    kind = OnPolicyTrainer if "rollouts" in options else DistillTrainer
    options = {"data_collator": plain_collator(), "teacher": None, **options}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            max_steps=steps,
            per_device_train_batch_size=BATCH // samples,
            learning_rate=rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=min(5, steps),
            adam_beta2=0.98,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = kind(
            student, args=arguments, train_dataset=rows, processing_class=tokenizer(), callbacks=[curve], **options
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.close()
    return curve.points
