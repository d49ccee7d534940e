"""A finished run, opened again: the student that it left, beside its teacher, tokenizer and data."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from kdlm.data import Data, DataSection, ImageTextSection
from kdlm.losses import kept_rows
from kdlm.measuring.measure import moved
from kdlm.models import DenoiserStudent, PretrainedStudent, VisionLanguageStudent
from kdlm.opening import common_ids, loaded
from kdlm.recipe import Recipe, across, load
from kdlm.run_folder import RunFolder
from kdlm.teachers import CachedTeacher, SelfTeacherSection


@dataclass(frozen=True)
class FinishedRun:
    """What a run over text left and was made of.

    Attributes:
        recipe: as it was run, with the student that it left in place of the one that it began with.
        student: the model, on `device`, in evaluation mode.
        teacher: as in training; None for a recipe without one.
        tokenizer, their_tokenizer: the student's, and the teacher's where it reads the text in another one.
        data: as in training.
        vocab: ids that student and teacher share.
        device: where both were asked to run.
    """

    recipe: Recipe
    student: Any
    teacher: Any
    tokenizer: Any
    their_tokenizer: Any
    data: Data
    vocab: Any
    device: torch.device

    def close(self) -> None:
        """Let go of what the teacher holds beside its weights."""
        if hasattr(self.teacher, "close"):
            self.teacher.close()


def with_own_student(recipe: Recipe) -> Recipe:
    """Return a recipe whose student is the one that its run left.

    Raises ValueError where the run has not ended.
    """
    folder, began = RunFolder(recipe.run_dir).student, recipe.student
    if not folder.is_dir():
        raise ValueError(f"run_dir: {recipe.run_dir} holds no student: run kdlm train to its end first")
    if isinstance(began, DenoiserStudent):
        left: Any = DenoiserStudent(path=str(folder))
    elif isinstance(began, VisionLanguageStudent):
        left = began.model_copy(update={"path": str(folder), "weights": "pretrained", "revision": None, "lora": None})
    elif (folder / "adapter_config.json").is_file() or not hasattr(began, "tokenizer"):
        left = began  # an adapter is put on the model that the run began with
    else:
        kept = {name: getattr(began, name) for name in ("dtype", "attention") if hasattr(began, name)}
        left = PretrainedStudent(path=str(folder), **kept)
    return recipe.model_copy(update={"student": left})


def open_run(path: Path) -> FinishedRun:
    """Open a run folder whose student is a language model.

    Raises ValueError where there is no finished run, or one of another kind (images, diffusion).
    """
    described = path / "recipe.yaml"
    if not described.is_file():
        raise ValueError(f"{path}: no run folder, there is no recipe.yaml")
    began = load(described).model_copy(update={"run_dir": path})
    if not isinstance(began.data, DataSection | ImageTextSection):
        raise ValueError(f"{path}: {began.method.name} trains no language model, there are no tokens to look at")
    recipe = with_own_student(began)
    device = recipe.training.build(output_dir=str(path), seed=recipe.seed, disable_tqdm=True).device
    processor, data = loaded(recipe)
    student: Any = recipe.student.load()
    if (path / "student" / "adapter_config.json").is_file():
        from peft import PeftModel

        student = PeftModel.from_pretrained(student, str(path / "student"))
    if isinstance(recipe.teacher, SelfTeacherSection):  # what it was while training is not kept
        recipe = recipe.model_copy(update={"teacher": None})
    teacher: Any = None if recipe.teacher is None else recipe.teacher.build(device)
    if isinstance(teacher, CachedTeacher):
        teacher.made_with = data.made_with
    if hasattr(teacher, "to"):
        teacher.to(device)
    vocab = common_ids(recipe, processor, student, teacher)
    if teacher is not None and getattr(teacher, "needs_fit", False):
        teacher.fit(_held_out(data, device), vocab)
    theirs = recipe.teacher.tokenizer() if recipe.teacher is not None and across(recipe) else None
    tokenizer = getattr(processor, "tokenizer", processor)
    return FinishedRun(recipe, student.to(device).eval(), teacher, tokenizer, theirs, data, vocab, device)


def _held_out(data: Data, device: torch.device) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield the batches of the evaluation rows, from which a teacher learns how to weigh its members."""
    for batch in DataLoader(data.eval, 8, collate_fn=data.collator):  # pyright: ignore[reportArgumentType]
        there = moved(batch, device)
        read = there["theirs"] if "chunks" in there else there  # a teacher with a tokenizer of its own
        yield read, kept_rows(read["labels"])
