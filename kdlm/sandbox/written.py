"""Text that a sandbox model wrote: what a student learns from where only its teacher's words are to be had."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlm.sandbox.jsonl import read_jsonl, write_jsonl
from kdlm.sandbox.language_models import no_bars, torch_release
from kdlm.sandbox.progress import Progress

OPENING = 8  # tokens of a line of the corpus, which the model goes on from
LENGTH = 128  # tokens with the opening: the window that the model was trained on
BATCH = 64


@dataclass(frozen=True)
class WrittenText:
    """`train.jsonl`: at least `chars` characters sampled from `model` at temperature 1.

    Each row begins with the first tokens of a line drawn from `data`'s train.jsonl, in the model's tokens, and ends
    after 128 of them or where the model ended the document.
    """

    model: str
    chars: int
    seed: int
    data: str = "code"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.model, self.data)

    def ingredients(self) -> dict[str, Any]:
        return {**asdict(self), "torch": torch_release()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        rows: list[dict[str, str]] = []
        chars = 0
        with progress(f"{name}: writing", self.chars) as advance:
            for text in self._texts(built):
                rows.append({"path": f"written/{len(rows):04d}.py", "text": text})
                chars += len(text)
                advance(len(text), "")
                if chars >= self.chars:
                    break
        write_jsonl(folder / "train.jsonl", rows)
        return {"train": {"documents": len(rows), "chars": chars}}

    def _texts(self, built: dict[str, Path]) -> Iterator[str]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from kdlm.sandbox.pretraining import one_thread

        tokenizer: Any = AutoTokenizer.from_pretrained(built[self.model])
        with no_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(built[self.model], dtype=torch.float32).eval()
        openings = line_openings(tokenizer, built[self.data] / "train.jsonl")
        with torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(self.seed)
            while True:
                drawn = openings[torch.randint(len(openings), (BATCH,))]
                texts = tokenizer.batch_decode(go_on(model, drawn), skip_special_tokens=True)
                yield from (text for text in texts if "\ufffd" not in text)  # bytes that are no letter


def go_on(model: Any, openings: Any) -> Any:
    """Return the openings, each with what the model samples after it from its whole distribution."""
    return model.generate(openings, max_length=LENGTH, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)


def line_openings(tokenizer: Any, path: Path) -> Any:
    """Return the first tokens of every line that is not blank, [lines, OPENING]."""
    import torch

    texts = [row["text"] for row in read_jsonl(path)]
    lines = [text[start : start + 20 * OPENING] for text in texts for start in _starts(text)]
    rows = tokenizer(lines)["input_ids"]
    return torch.tensor([row[:OPENING] for row in rows if len(row) >= OPENING])


def _starts(text: str) -> Iterator[int]:
    start = 0
    for line in text.splitlines(keepends=True):
        if line.strip():
            yield start
        start += len(line)
