"""A small pretraining loop for the sandbox's own models: packed random windows, AdamW, cosine decay, fp32."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from kdlm.sandbox.jsonl import read_jsonl
from kdlm.sandbox.language_models import Training
from kdlm.sandbox.progress import Progress

WARM_UP = 0.05
WEIGHT_DECAY = 0.1
EVAL_TOKENS = 32_768


def pretrain(
    model: Any, tokenizer: Any, data: Path, training: Training, seed: int, progress: Progress, name: str
) -> dict[str, Any]:
    """Train the model in place; return the figures that its folder keeps (losses in nats per token)."""
    tokens = encode_documents(tokenizer, data / f"{training.file}.jsonl")
    optimizer = torch.optim.AdamW(_groups(model), lr=training.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, training.steps))
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        windows = _draw(tokens, training, generator)
        logits = model(input_ids=windows[:, :-1]).logits
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    with one_thread():
        descend(model, loss, optimizer, schedule, training.steps, progress, name)
        held_out = held_out_loss(model, encode_documents(tokenizer, data / "eval.jsonl"), training.window)
    seen = training.steps * training.batch * training.window
    return {"tokens_in_data": len(tokens), "tokens_seen": seen, "held_out_loss": round(held_out, 4)}


def descend(
    model: Any, loss_of: Callable[[], Tensor], optimizer: Any, schedule: Any, steps: int, progress: Progress, name: str
) -> None:
    """Take steps along the gradient of what `loss_of` draws, its norm cut at 1; leave the model in eval mode."""
    model.train()
    with progress(f"{name}: training", steps) as advance:
        for _ in range(steps):
            loss = loss_of()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(1, f"loss {loss.item():.3f}")
    model.eval()


def encode_documents(tokenizer: Any, path: Path) -> Int[Tensor, "tokens"]:
    """Return the texts of a jsonl file as one row of tokens, each document ended by `<eos>`."""
    rows = tokenizer([row["text"] for row in read_jsonl(path)], verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])


@torch.no_grad()
def held_out_loss(model: Any, tokens: Int[Tensor, "tokens"], window: int) -> float:
    """Return the mean cross-entropy (nats per token) over the first tokens, cut into windows without overlap."""
    length = min(len(tokens), EVAL_TOKENS) // window * window
    total = count = 0.0
    for windows in tokens[:length].view(-1, window).split(16):
        logits = model(input_ids=windows).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
        count += windows[:, 1:].numel()
    return total / count


def _draw(tokens: Int[Tensor, "tokens"], training: Training, generator: torch.Generator) -> Int[Tensor, "batch window"]:
    """One token more than the window: the last one is only predicted."""
    starts = torch.randint(len(tokens) - training.window, (training.batch, 1), generator=generator)
    return tokens[starts + torch.arange(training.window + 1)]


def _groups(model: Any) -> list[dict[str, Any]]:
    """Norms do not decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / (WARM_UP * steps))
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Two threads are a little faster on an idle machine and ten times slower on a busy one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
