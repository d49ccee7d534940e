"""The datasets and tokenizers: what each writes into its folder."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlm.sandbox.arithmetic import arithmetic
from kdlm.sandbox.corpus import Document, split_documents, stdlib_digest, stdlib_documents
from kdlm.sandbox.entities import entities
from kdlm.sandbox.jsonl import read_jsonl, write_jsonl
from kdlm.sandbox.lessons import reversals
from kdlm.sandbox.progress import Progress
from kdlm.sandbox.strings import strings
from kdlm.sandbox.tasks import LEVELS, Task
from kdlm.sandbox.tokenizer import train_tokenizer
from kdlm.sandbox.walks import walks


@dataclass(frozen=True)
class CodeCorpus:
    """The standard library's sources: `teacher.jsonl`, `train.jsonl` (a small part of it) and `eval.jsonl`."""

    train_chars: int
    eval_chars: int
    needs: tuple[str, ...] = ()

    def split(self) -> dict[str, list[Document]]:
        return split_documents(stdlib_documents(), train_chars=self.train_chars, eval_chars=self.eval_chars)

    def ingredients(self) -> dict[str, Any]:
        return {**asdict(self), "documents": stdlib_digest()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for split, documents in self.split().items():
            write_jsonl(folder / f"{split}.jsonl", (asdict(document) for document in documents))
            figures[split] = {"documents": len(documents), "chars": sum(len(document.text) for document in documents)}
        return figures


FAMILIES: dict[str, Callable[..., Sequence[Task]]] = {
    "arithmetic": arithmetic,
    "strings": strings,
    "entities": entities,
    "walks": walks,
    "reversals": reversals,
}


@dataclass(frozen=True)
class TaskSet:
    """Tasks of some levels with their solutions, so many of each: `train.jsonl` and `eval.jsonl`."""

    family: str
    train: int
    eval: int
    seed: int
    levels: tuple[int, ...] = LEVELS
    needs: tuple[str, ...] = ()

    def ingredients(self) -> dict[str, Any]:
        spec = asdict(self)
        if self.levels == LEVELS:  # folders from before there was a choice keep their digest
            del spec["levels"]
        return spec

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        generate = FAMILIES[self.family]
        for split, n in (("train", self.train), ("eval", self.eval)):
            tasks = [task for level in self.levels for task in generate(seed=self.seed, level=level, n=n, split=split)]
            write_jsonl(folder / f"{split}.jsonl", (asdict(task) for task in tasks))
        return {"train": self.train * len(self.levels), "eval": self.eval * len(self.levels)}


@dataclass(frozen=True)
class CodeTokenizer:
    """A tokenizer of `vocab_size` ids and a kind of `tokenizer_kinds.py`, trained on one file of the code corpus."""

    vocab_size: int
    file: str = "teacher"
    kind: str = "bpe"
    needs: tuple[str, ...] = ("code",)

    def ingredients(self) -> dict[str, Any]:
        spec = asdict(self)
        if self.kind == "bpe":  # folders from before there were other kinds keep their digest
            del spec["kind"]
        return spec

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        with progress(f"{name}: training", 0):
            texts = (row["text"] for row in read_jsonl(built["code"] / f"{self.file}.jsonl"))
            train_tokenizer(texts, self.vocab_size, folder, self.kind)
        return {"tokens": self.vocab_size}
