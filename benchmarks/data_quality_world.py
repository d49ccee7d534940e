"""The small world of `data_quality.py`: sums worked digit by digit, its two models, and what is measured.

A level is a number of digits. `?58+67=` is worked from the last column to the first, one a line: the two digits, what
is carried in, and what they make. The last line is the answer:

    87015
    56112
    125

The other task is to turn words round, `<cafes=` `sefac`. The teacher has read sums of up to 7 digits; it solves nearly
all of up to 4, most of 5 and 6. The student is smaller and has read fewer, of up to 6; it solves nearly all of up to 4,
some of 5, few of 6. Neither can add 7 or 8, and what either writes there is as long, and wrong.
"""

import hashlib
import random
import string
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.losses import chunked, cross_entropy, forward_kl, kept_rows
from kdlm.models import Predictor
from kdlm.rollouts import GenerateEngine, Sampling
from kdlm.sandbox import build
from kdlm.sandbox.language_models import Shape, no_bars, torch_release
from kdlm.sandbox.progress import Progress, console
from kdlm.sandbox.store import finished_folder
from kdlm.signal import IGNORE_INDEX

LEVELS = (1, 2, 3, 4, 5, 6, 7, 8)
LONGEST = 64  # tokens of a completion; 8 digits take 57
BATCH = 64  # rows of an optimiser step
SAMPLES = 4  # how often a held-out sum is tried at temperature 1
HELD_OUT = 8  # one sum in eight
WORDS = 200  # on which forgetting is measured

disable_progress_bar()
torch.set_num_threads(1)

Row = dict[str, Any]
Point = dict[str, Any]


# Problems


def sums(seed: int, each: int, *, held_out: bool) -> list[Row]:
    """Return so many different sums of each level, as far as there are (there are 100 of one digit)."""
    found: list[Row] = []
    for level in LEVELS:
        generator = random.Random(f"{seed} {level} {held_out}")
        seen: dict[str, Row] = {}
        for _ in range(100 * each):
            sum_ = _sum(generator, level)
            prompt = f"?{sum_}="
            if (hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT == 0) == held_out:
                seen.setdefault(prompt, {"prompt": prompt, "answer": worked(sum_)[-1], "level": level})
            if len(seen) == each:
                break
        found += seen.values()
    return found


def right(answer: str, completion: str) -> bool:
    """Say whether a worked solution ends with the answer."""
    return completion.split("\n")[-1] == answer


def _sum(generator: random.Random, level: int) -> str:
    fewest = 10 ** (level - 1) if level > 1 else 0
    return f"{generator.randint(fewest, 10**level - 1)}+{generator.randint(fewest, 10**level - 1)}"


def worked(sum_: str) -> list[str]:
    a, b = sum_.split("+")
    carry, lines = 0, []
    for x, y in zip(a[::-1], b[::-1], strict=True):
        value = int(x) + int(y) + carry
        lines.append(f"{x}{y}{carry}{value:02d}")
        carry = value // 10
    return [*lines, str(int(a) + int(b))]


def _word(generator: random.Random) -> str:
    return "".join(generator.choices(string.ascii_lowercase, k=5))


# Models


@dataclass(frozen=True)
class Reading:
    """How a model comes to be: what it has read, of which loss only worked solutions and turned words have.

    Attributes:
        shape: its architecture.
        shares: how much it reads of each level; 0 are words.
        steps: of 64 texts.
        rate: at its peak, from which it falls in a line to a tenth.
        seed: of the texts.
    """

    shape: Shape
    shares: dict[int, int]
    steps: int
    rate: float
    seed: str


MODELS = {
    "teacher": Reading(
        Shape(width=96, layers=2, heads=4, feed_forward=192),
        {0: 12, 1: 8, 2: 12, 3: 16, 4: 20, 5: 18, 6: 10, 7: 3},
        steps=2_000,
        rate=4e-3,
        seed="t0",
    ),
    "start": Reading(
        Shape(width=64, layers=2, heads=4, feed_forward=128),
        {0: 28, 1: 9, 2: 13, 3: 16, 4: 17, 5: 11, 6: 6},
        steps=900,
        rate=5e-3,
        seed="w0",
    ),
    "deep": Reading(  # of which pruned_students.py leaves layers out
        Shape(width=64, layers=6, heads=4, feed_forward=128),
        {0: 28, 1: 9, 2: 16, 3: 23, 4: 24},
        steps=700,
        rate=4e-3,
        seed="d0",
    ),
}


def folder(name: str) -> Path:
    """Return where a model of the world lies; it is built the first time."""
    ingredients = {**asdict(MODELS[name]), "torch": torch_release()}
    make = partial(_read, MODELS[name], progress=console, name=f"sums-{name}")
    return finished_folder(f"sums-{name}", ingredients, make, cache=None, progress=console)


def opened(name: str) -> Any:
    """Return a model of the world, fresh."""
    return AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32).eval()


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(build("code-tokenizer-bytes"))


def _read(reading: Reading, path: Path, progress: Progress, name: str) -> dict[str, Any]:
    end, pad = tokenizer().eos_token_id, tokenizer().pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(reading.shape.config(len(tokenizer()), end, pad, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=reading.rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = random.Random(reading.seed)
    with progress(f"{name}: training", reading.steps) as advance:
        for step in range(1, reading.steps + 1):
            rate = reading.rate * min(1, step / 100) * (1 - 0.9 * step / reading.steps)
            optimizer.param_groups[0]["lr"] = rate
            batch: Any = Collator(pad)([_text(generator, reading.shares) for _ in range(BATCH)])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            kept = batch["labels"][:, 1:] != IGNORE_INDEX
            loss = cross_entropy(logits[:, :-1][kept], batch["labels"][:, 1:][kept]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            advance(1, f"loss {loss.item():.3f}")
    with no_bars():
        model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return {"parameters": model.num_parameters()}


def _text(generator: random.Random, shares: dict[int, int]) -> Row:
    level = generator.choices(list(shares), weights=list(shares.values()))[0]
    if level == 0:
        word = _word(generator)
        return row(f"<{word}=", word[::-1])
    sum_ = _sum(generator, level)
    return row(f"?{sum_}=", "\n".join(worked(sum_)))


# Rows, rollouts, training


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def row(prompt: str, completion: str, **more: Any) -> Row:
    """Return a row that is trained on its completion and the end token."""
    before, after = ids(prompt), [*ids(completion), tokenizer().eos_token_id]
    return {"input_ids": before + after, "labels": [IGNORE_INDEX] * len(before) + after, **more}


def pair(prompt: str, chosen: str, rejected: str) -> Row:
    """Return a preference, as the data of a recipe become one."""
    sides = [row(prompt, chosen), row(prompt, rejected)]
    joined = {name: [*sides[0][name], *sides[1][name]] for name in ("input_ids", "labels")}
    return {**joined, "seq_lengths": [len(side["input_ids"]) for side in sides], "rejected": [0, 1]}


def trained_tokens(one: Row) -> int:
    return sum(label != IGNORE_INDEX for label in one["labels"])


def drawn(model: Any, prompts: Sequence[str], *, temperature: float, seed: int = 7, samples: int = 1) -> list[str]:
    """Return completions of the prompts as text, those of a prompt one after another."""
    engine = GenerateEngine([tokenizer().eos_token_id], tokenizer().pad_token_id, batch_size=8 * BATCH)
    engine.take(model, 0)
    sampling = Sampling(temperature=temperature, max_new_tokens=LONGEST, samples_per_prompt=samples)
    written = engine.generate([ids(prompt) for prompt in prompts], sampling, seed)
    return tokenizer().batch_decode([one.ids for one in written], skip_special_tokens=True)


def generated(model: Any, problems: list[Row], *, temperature: float, samples: int, seed: int) -> Dataset:
    """Return completions as `generate` and `verify` leave them."""
    asked = [(n, one) for n, one in enumerate(problems) for _ in range(samples)]
    prompts = [one["prompt"] for one in problems]
    texts = drawn(model, prompts, temperature=temperature, seed=seed, samples=samples)
    scores = [float(right(one["answer"], text)) for (_, one), text in zip(asked, texts, strict=True)]
    solved = [int(sum(scores[n * samples : (n + 1) * samples])) for n in range(len(problems))]
    made = [
        {
            **one,
            "prompt_id": str(n),
            "completion": text,
            "score": score,
            "verdict": "judged",
            "solved": solved[n],
            "attempts": samples,
        }
        for (n, one), text, score in zip(asked, texts, scores, strict=True)
    ]
    return Dataset.from_list(made)


def streamed(rows: Sequence[Row], tokens: float, seed: int, weights: Sequence[float] | None = None) -> list[Row]:
    """Return rows until they hold so many tokens that are trained on: all of them, then all again in another order.

    With weights each is drawn in proportion to its own, with replacement.
    """
    generator, out, held = random.Random(f"order {seed}"), [], 0
    while True:
        order = generator.sample(range(len(rows)), len(rows))
        for number in order if weights is None else generator.choices(range(len(rows)), weights, k=len(rows)):
            out.append(rows[number])
            held += trained_tokens(rows[number])
            if held >= tokens:
                return out


def trained(student: Any, rows: list[Row], method: Any, *, rate: float, seed: int, teacher: Any = None) -> None:
    """Train a student in place, once over the rows; a step takes 64 sequences."""
    batch = BATCH // 2 if "rejected" in rows[0] else BATCH
    steps = -(-len(rows) // batch)
    with tempfile.TemporaryDirectory() as path:
        arguments = TrainingArguments(
            output_dir=path,
            report_to="none",
            use_cpu=True,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(5, steps),
            adam_beta2=0.98,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = DistillTrainer(
            student,
            teacher,
            arguments,
            method=method,
            train_dataset=rows,
            processing_class=tokenizer(),
            data_collator=Collator(tokenizer().pad_token_id),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.close()


# What is measured


def accuracy(model: Any, each: int, temperature: float, samples: int = 1) -> dict[str, float]:
    """Return the share of held-out sums, so many of each level, that the model gets right, by level."""
    problems = sums(99, each, held_out=True)
    found = generated(model, problems, temperature=temperature, samples=samples, seed=7)
    scores: dict[int, list[float]] = {level: [] for level in LEVELS}
    for level, score in zip(found["level"], found["score"], strict=True):
        scores[level].append(score)
    return {str(level): fmean(values) for level, values in scores.items()}


def forgetting(start: Any, model: Any) -> float:
    """Return KL(start || model) in nats a token of words turned round."""
    generator = random.Random("words")
    words = [_word(generator) for _ in range(WORDS)]
    batch: Any = Collator(tokenizer().pad_token_id)([row(f"<{word}=", word[::-1]) for word in words])
    kept = kept_rows(batch["labels"])
    with torch.no_grad():
        return chunked(forward_kl, Predictor(model)(batch, kept), Predictor(start)(batch, kept)).mean().item()


def measured(start: Any, model: Any, each: int) -> Point:
    """Return accuracies on so many held-out sums of each level, the mean over levels and each; and forgetting."""
    model.eval()
    levels = {"greedy": accuracy(model, each, 0.0), "sampled": accuracy(model, each, 1.0, SAMPLES)}
    means = {name: fmean(values.values()) for name, values in levels.items()}
    return {**means, "forgetting": forgetting(start, model), "levels": levels}
