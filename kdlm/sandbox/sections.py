"""How a recipe names sandbox models and data."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from kdlm.section import Section


class SandboxModel(Section):
    """A causal language model of the sandbox, built on this machine at its first use."""

    name: Literal["sandbox"] = "sandbox"
    model: Literal[
        "code-teacher",
        "code-student",
        "code-teacher-padded",
        "code-teacher-tiny",
        "code-student-tiny",
        "code-teacher-tiny-padded",
    ]
    """Which one; `kdlm/sandbox/README.md` has the table."""

    def resolve(self) -> Path:
        """Return its folder, which `from_pretrained` opens. Builds it when missing: minutes for `code-teacher`."""
        from kdlm.sandbox.catalog import build

        return build(self.model)


class SandboxData(Section):
    """A file of a sandbox dataset, made on this machine at its first use."""

    name: Literal["sandbox"] = "sandbox"
    data: Literal["code", "arithmetic", "strings", "digits-questions"]
    """The dataset: `code` has a column `text`; the tasks have `prompt`, `completion` and `answer`; `digits-questions`
    has `prompt`, `completion` and `images`."""
    file: Literal["train", "eval", "teacher"] = "train"
    """Its file; `teacher`, all that the code teacher read, is in `code` only."""

    @model_validator(mode="after")
    def _has_file(self) -> Self:
        if self.file == "teacher" and self.data != "code":
            raise ValueError(f"{self.data} has the files train and eval; teacher is a file of code")
        return self

    def resolve(self) -> Path:
        """Return the jsonl file, or the parquet file of images. Makes it when missing: seconds."""
        from kdlm.sandbox.catalog import build

        return build(self.data) / f"{self.file}.{'parquet' if self.data == 'digits-questions' else 'jsonl'}"
