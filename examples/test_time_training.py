"""A model trains on what is like an input it is unsure of, answers it, and is what it was again: TT-SI and TT-D.

    python examples/test_time_training.py --student ./student --inputs inputs.jsonl                       # TT-SI
    python examples/test_time_training.py --student ./student --inputs inputs.jsonl --generator ./larger  # TT-D

After "Self-Improving LLM Agents at Test-Time" (arXiv 2510.07841, known by third-party notes). Rows of inputs.jsonl:
{"input", "candidates"}, and "answer", one of these, where accuracy is to be counted. Of each input:

1. The candidates' log-probabilities, each a mean over its tokens, go through a softmax; u = p1 - p2, the two largest.
   (As printed the paper's score has the negative log-probability, the wrong sign.) With u < tau it is uncertain.
2. A model continues `--ask` by K pairs of an input and an action, one a line; itself, or a stronger one. What is no
   pair is dropped, and so is a pair with the very input that is asked.
3. A fresh LoRA is trained on them, the candidates are scored again, and the LoRA is taken away.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.data.encoding import leading_tokens
from kdlm.losses import CrossEntropy
from kdlm.methods import SequenceKD
from kdlm.models import Lora, adapt, named
from kdlm.rollouts import GenerateSection, Sampling
from kdlm.signal import IGNORE_INDEX

Pair = tuple[str, str]
"""An input and the action that it calls for."""


def encoded(tokenizer: Any, given: str, action: str) -> dict[str, list[int]]:
    """Return an input and its action as a row that is trained on the action and the end after it."""
    prompt, rest = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (given, action))
    prompt, rest = [*leading_tokens(tokenizer), *prompt], [*rest, tokenizer.eos_token_id]
    return {"input_ids": [*prompt, *rest], "labels": [IGNORE_INDEX] * len(prompt) + rest}


@torch.no_grad()
def scores(model: Any, tokenizer: Any, given: str, candidates: Sequence[str]) -> Tensor:
    """Return the mean log-probability of each candidate's tokens after the input `[candidates]`."""
    found = []
    for action in candidates:
        row = encoded(tokenizer, given, action)
        ids, labels = (torch.tensor(row[name], device=model.device) for name in ("input_ids", "labels"))
        kept = labels[1:] != IGNORE_INDEX
        logs = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)[kept]
        found.append(logs.gather(-1, labels[1:][kept, None]).mean())
    return torch.stack(found)


def awareness(found: Tensor) -> float:
    """Return u = p1 - p2 of the softmax over scores, 0 to 1; 1 for a single candidate."""
    largest = found.softmax(-1).topk(min(2, len(found))).values
    return float(largest[0] - largest[1]) if len(found) > 1 else 1.0


class Generator:
    """Writes pairs like a given one."""

    def __init__(self, model: Any, tokenizer: Any, ask: str, max_tokens: int):
        self.tokenizer, self.ask, self.max_tokens = tokenizer, ask, max_tokens
        self.engine = GenerateSection().build(model, tokenizer, model.device, copied=False)
        self.engine.take(model, 0)

    def __call__(self, given: str, action: str, count: int, seed: int) -> list[Pair]:
        asked = self.ask.replace("{input}", given).replace("{action}", action)
        prompt = [*leading_tokens(self.tokenizer), *self.tokenizer(asked, add_special_tokens=False)["input_ids"]]
        sampling = Sampling(max_new_tokens=self.max_tokens, samples_per_prompt=count)
        drawn = self.engine.generate([prompt], sampling, seed)
        texts = self.tokenizer.batch_decode([one.ids for one in drawn], skip_special_tokens=True)
        lines = [[line for line in text.split("\n") if line.strip()] for text in texts]
        end = "\n" if given.endswith("\n") else ""
        return [(found[0] + end, found[1]) for found in lines if len(found) > 1 and found[0] + end != given]


def adapted(model: Any, tokenizer: Any, pairs: Sequence[Pair], args: argparse.Namespace, seed: int) -> Any:
    """Return the model with a fresh LoRA that was trained on the pairs; `unload()` gives the model back."""
    torch.manual_seed(seed)
    student = adapt(model, Lora(rank=args.rank, alpha=2.0 * args.rank))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=args.epochs, learning_rate=args.learning_rate, per_device_train_batch_size=1,
            lr_scheduler_type="cosine", warmup_steps=0.03, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=seed, use_cpu=model.device.type == "cpu",
        )  # fmt: skip
        trainer = DistillTrainer(
            student,
            None,
            settings,
            method=SequenceKD([CrossEntropy()]),
            train_dataset=[encoded(tokenizer, *pair) for pair in pairs],
            processing_class=tokenizer,
            data_collator=Collator(tokenizer.eos_token_id),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return student.eval()


def answer(
    model: Any, tokenizer: Any, row: dict[str, Any], similar: Callable[..., list[Pair]], args: Any, seed: int
) -> dict[str, Any]:
    """Return the row with what the model chooses, before and after; the model is what it was when this returns."""
    found = scores(model, tokenizer, row["input"], row["candidates"])
    sure, first = awareness(found), row["candidates"][int(found.argmax())]
    told = row | {"awareness": sure, "first": first, "chosen": first, "pairs": 0}
    pairs = similar(row["input"], first, args.pairs, seed) if sure < args.tau else []
    if pairs:
        trainable = [p.requires_grad for p in model.parameters()]
        student = adapted(model, tokenizer, pairs, args, seed)
        after = scores(student, tokenizer, row["input"], row["candidates"])
        student.unload()
        for parameter, flag in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(flag)
        told |= {"chosen": row["candidates"][int(after.argmax())], "pairs": len(pairs)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="folder, hub id, or sandbox:NAME")
    parser.add_argument("--inputs", required=True, type=Path)
    parser.add_argument("--generator", help="who writes similar pairs; by default the student (TT-SI)")
    parser.add_argument("--tau", type=float, default=0.95, help="inputs with u below it are uncertain; 0: none is")
    parser.add_argument("--pairs", type=int, default=1, help="similar pairs of an uncertain input, K")
    parser.add_argument("--ask", default="{input}{action}\n\n", help="what the generator continues")
    parser.add_argument("--max-tokens", type=int, default=96, help="of a pair")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA, whose alpha is twice that")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model = named(args.student).tokenizer(), named(args.student).load().to(device=device).eval()
    other = args.generator
    writer = named(other).load().to(device=device).eval() if other else model
    similar = Generator(writer, named(other).tokenizer() if other else tokenizer, args.ask, args.max_tokens)
    rows = [json.loads(line) for line in args.inputs.read_text().splitlines()]
    told = [answer(model, tokenizer, row, similar, args, args.seed + number) for number, row in enumerate(rows)]
    unsure = sum(row["awareness"] < args.tau for row in told)
    print(f"{len(told)} inputs, {unsure} uncertain, {sum(row['pairs'] > 0 for row in told)} trained on")
    if counted := [row for row in told if "answer" in row]:
        first, last = (
            sum(row[name] == row["answer"] for row in counted) / len(counted) for name in ("first", "chosen")
        )
        print(f"right: {first:.3f} before, {last:.3f} after")


if __name__ == "__main__":
    main()
