"""How a recipe names sandbox models and data."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from kdlm.section import Section

FILES = {
    "code": ("train", "eval", "teacher"),
    "code-written": ("train",),
    "tools": ("train", "eval", "demonstrations", "conversations"),
}  # of the others: train and eval


class SandboxModel(Section):
    """A causal language model of the sandbox, built on this machine at its first use."""

    name: Literal["sandbox"] = "sandbox"
    model: Literal[
        "code-teacher",
        "code-student",
        "code-teacher-padded",
        "code-teacher-4k",
        "code-student-4k",
        "code-student-unigram",
        "code-student-bytes",
        "code-teacher-tiny",
        "code-student-tiny",
        "code-student-tiny-unigram",
        "code-student-tiny-bytes",
        "code-teacher-tiny-padded",
        "walks-start",
        "walks-teacher",
    ]
    """Which one; `kdlm/sandbox/README.md` has the table."""

    def resolve(self) -> Path:
        """Return its folder, which `from_pretrained` opens. Builds it when missing: minutes for a `code-teacher`."""
        from kdlm.sandbox.catalog import build

        return build(self.model)


class SandboxData(Section):
    """A file of a sandbox dataset, made on this machine at its first use."""

    name: Literal["sandbox"] = "sandbox"
    data: Literal[
        "code",
        "code-written",
        "code-modules",
        "arithmetic",
        "strings",
        "entities",
        "tools",
        "sums",
        "sums-tens",
        "walks",
        "reversals",
        "digits-questions",
    ]
    """The dataset: `code` and `code-written`, the words of `code-teacher-4k`, have a column `text`; the tasks have
    `prompt`, `completion` and `answer`, `walks` a `solution` too; `code-modules` and `sums-tens` have `text` and
    `label`; `tools` has `prompt` and `task`; `digits-questions` has `prompt`, `completion` and `images`."""
    file: Literal["train", "eval", "teacher", "demonstrations", "conversations"] = "train"
    """Its file; `teacher`, all that the code teacher read, is in `code` only; `code-written` is `train` alone;
    `demonstrations` and `conversations`, how tasks are solved, are in `tools`."""

    @model_validator(mode="after")
    def _has_file(self) -> Self:
        files = FILES.get(self.data, ("train", "eval"))
        if self.file not in files:
            raise ValueError(f"{self.data} has the files {' and '.join(files)}, not {self.file}")
        return self

    def resolve(self) -> Path:
        """Return the jsonl file, or the parquet file of images. Makes it when missing: seconds."""
        from kdlm.sandbox.catalog import build

        return build(self.data) / f"{self.file}.{'parquet' if self.data == 'digits-questions' else 'jsonl'}"
