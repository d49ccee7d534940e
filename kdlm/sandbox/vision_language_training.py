"""Training of a small vision-language model on questions about the digits."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from kdlm.sandbox.pretraining import descend, one_thread, rate
from kdlm.sandbox.progress import Progress

EVALUATED = 300
WEIGHT_DECAY = 0.05


def train(model: Any, processor: Any, data: Path, spec: Any, progress: Progress, name: str) -> dict[str, Any]:
    """Train the model in place; return the share of held-out answers that it gives right."""
    rows = encoded(processor, data / "train.parquet")
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, spec.steps))
    generator = torch.Generator().manual_seed(spec.seed)

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(rows["input_ids"]), (spec.batch,), generator=generator)
        batch = {key: value[chosen] for key, value in rows.items()}
        answers = batch.pop("answers")
        logits = model(**batch).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), answers[:, 1:].flatten())

    with one_thread():
        descend(model, loss, optimizer, schedule, spec.steps, progress, name)
        accuracy = answered(model, encoded(processor, data / "eval.parquet", EVALUATED))
    return {"questions_seen": spec.steps * spec.batch, "held_out_accuracy": round(accuracy, 4)}


def encoded(processor: Any, path: Path, limit: int | None = None) -> dict[str, torch.Tensor]:
    """Return all rows as one padded batch; `answers` are the labels: the answer and the end of its turn."""
    import pyarrow.parquet as pq
    from PIL import Image
    from pyarrow import BufferReader

    rows = pq.read_table(path).to_pylist()[:limit]
    texts = [
        processor.apply_chat_template(
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]},
                {"role": "assistant", "content": [{"type": "text", "text": row["completion"]}]},
            ]
        )
        for row in rows
    ]
    images = [Image.open(BufferReader(row["images"][0]["bytes"])) for row in rows]
    batch = dict(processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt"))
    ends = batch["attention_mask"].sum(-1, keepdim=True)
    places = torch.arange(batch["input_ids"].shape[1])
    return batch | {"answers": torch.where((places >= ends - 2) & (places < ends), batch["input_ids"], -100)}


@torch.no_grad()
def answered(model: Any, rows: dict[str, torch.Tensor]) -> float:
    """Return the share of answers of which the model finds every token likeliest."""
    answers = rows["answers"][:, 1:]
    found = model(**{key: value for key, value in rows.items() if key != "answers"}).logits[:, :-1].argmax(-1)
    return ((found == answers) | (answers < 0)).all(-1).double().mean().item()
