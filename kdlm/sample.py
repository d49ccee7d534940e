"""`kdlm sample`: samples of a run's student beside its teacher's, as a picture, as tensors and in figures."""

from pathlib import Path

import safetensors.torch

from kdlm import checkpoints
from kdlm.diffusion_trainer import DiffusionTrainer
from kdlm.disk import write_bytes
from kdlm.finished_run import with_own_student
from kdlm.quality import SamplingSection
from kdlm.recipe import Recipe
from kdlm.run_folder import RunFolder
from kdlm.train import assemble


def sample(recipe: Recipe, output: str | None = None) -> list[str]:
    """Sample what a run has come to and return lines to print: where things are, and each figure.

    The finished student is sampled; of a run that still goes on, its newest checkpoint. All samples are written as
    `samples.safetensors` beside the picture. Raises ValueError when there is neither, or the method writes no samples.
    """
    folder = RunFolder(recipe.run_dir)
    found = checkpoints.finished(folder.path)
    if not folder.student.is_dir() and not found:
        raise ValueError(f"run_dir: {folder.path} holds neither a student nor a checkpoint: run kdlm train first")
    if folder.student.is_dir():
        recipe = with_own_student(recipe)
    if recipe.sampling is None:
        recipe = recipe.model_copy(update={"sampling": SamplingSection()})
    trainer = assemble(recipe).trainer
    if not isinstance(trainer, DiffusionTrainer) or recipe.sampling is None:
        raise ValueError(f"method: {recipe.method.name} trains no denoiser, so there is nothing to sample")
    if not folder.student.is_dir():
        trainer._load_from_checkpoint(str(found[-1]))
    picture = Path(output) if output is not None else folder.path / "samples.png"
    samples = trainer.sample(recipe.sampling.count, trainer.condition())
    tensors = {"samples": samples, **(trainer.condition() or {})}
    write_bytes(picture.with_suffix(".safetensors"), safetensors.torch.save(tensors))
    lines = [f"samples: {picture.with_suffix('.safetensors')}"]
    if trainer.draw(samples, picture):
        lines.append(f"picture: {picture}")
    return [*lines, *(f"{name} {value:.4g}" for name, value in trainer.figures(samples).items())]
