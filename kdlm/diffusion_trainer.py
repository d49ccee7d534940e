"""DiffusionTrainer: DistillTrainer for denoisers, whose evaluation looks at samples."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlm.diffusion import ODE, Condition, Draws, Level, karras_ratios
from kdlm.methods.diffusion.method import clean_of, condition_of
from kdlm.quality import SamplingSection, Yardstick, write_png, yardstick
from kdlm.trainer import DistillTrainer

EVALUATION = -1
"""The step that evaluation draws its noise of: the same noise at every evaluation of a run, and no step's."""
AT_ONCE = 512
"""Samples that a network writes at a time."""


class DiffusionTrainer(DistillTrainer):
    """Trains a denoiser with a method of `kdlm.methods.diffusion`.

    Args: as `DistillTrainer`, with denoisers for `model` and `teacher`. Rows have `samples` (or `pixel_values`) and
    `index`, and what they are of: `labels`, or the embeddings of prompts.

        sampling: what evaluation samples and measures beside the method's own terms; None samples nothing.
    """

    def __init__(self, *args: Any, sampling: SamplingSection | None = None, **options: Any):
        super().__init__(*args, **options)
        self.sampling = sampling
        self.pictures: Path | None = None
        """Folder for a picture of each evaluation: teacher above student, from the same noise."""
        self._yardstick: Yardstick | None = None

    @torch.no_grad()
    def sample(self, count: int, condition: Condition | None = None, *, sampler: Any = None, of: str = "") -> Tensor:
        """Return samples of a role, by default of the one that is exported, in the method's own way.

        Args:
            count: of samples; they and their noise are the same at every call.
            condition: what they are of, `count` of each.
            sampler: in place of the method's.
            of: a role, or `teacher`.
        """
        network = self.networks.views[of or self.method.exported]
        was_training = getattr(network, "training", False)
        network.eval()
        parts = []
        for at in range(0, count, AT_ONCE):
            places = torch.arange(at, min(count, at + AT_ONCE), device=self.args.device)
            part = condition and {key: value[places.cpu()].to(places.device) for key, value in condition.items()}
            draws = Draws(places, self.args.seed, EVALUATION)
            drawn = partial(sampler or self.method.sampler(), network, draws, part)
            parts.append(self.networks.ask(drawn).cpu())
        network.train(was_training)
        return torch.cat(parts)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ever; and, where it is asked for, on samples."""
        metrics = super().evaluate(*args, **kwargs)
        if self.sampling is not None:
            own = {f"eval_{name}": value for name, value in self.look().items()}
            self.log(own)
            metrics |= own
        return metrics

    def look(self) -> dict[str, float]:
        """Sample the student, measure the samples, and draw them beside the teacher's of the same noise."""
        assert self.sampling is not None
        samples = self.sample(self.sampling.count, self.condition())
        if self.pictures is not None and self.is_world_process_zero():
            self.draw(samples, self.pictures / f"step_{self.state.global_step}.png")
        return self.figures(samples)

    def figures(self, samples: Tensor) -> dict[str, float]:
        """Measure samples against training rows, as many of them."""
        return self.yardstick.figures(samples)

    def draw(self, samples: Tensor, path: Path) -> bool:
        """Draw samples of the student below the teacher's of the same noise; say whether their shape can be drawn."""
        assert self.sampling is not None
        sets, shown = {"student": samples}, self.sampling.shown
        if self.teacher is not None:
            teacher = self.sample(shown, self.condition(), sampler=self._flow(), of="teacher")
            sets = {"teacher": teacher, **sets}
        drawn = self.yardstick.picture(sets, shown)
        if drawn is not None:
            write_png(path, drawn)
        return drawn is not None

    def condition(self) -> Condition | None:
        """Return what the samples are of: what the rows are that they are compared with."""
        labels = self.yardstick.labels
        return condition_of({} if labels is None else {"labels": labels})

    @property
    def yardstick(self) -> Yardstick:
        """What samples are measured with; its two ends are the teacher in many steps, and in those of the student."""
        assert self.sampling is not None
        if self._yardstick is None:
            self._yardstick = yardstick(self.sampling, self.train_dataset, clean_of)
            if self.teacher is not None:
                ways = {"teacher": self._flow(), "start": self.method.sampler()}
                for end, sampler in ways.items():
                    samples = self.sample(self.sampling.count, self.condition(), sampler=sampler, of="teacher")
                    self._yardstick.ends[end] = self._yardstick.figures(samples)
        return self._yardstick

    def _flow(self) -> ODE:
        """Return how the teacher samples in many steps."""
        assert self.sampling is not None
        low, high = self.sampling.lowest, self.sampling.highest
        ratios = torch.tensor(karras_ratios(self.sampling.teacher_steps, low, high))
        times = self.networks.views["teacher"].form.time(Level(torch.ones_like(ratios), ratios))
        return ODE(tuple(times.tolist()), self.sampling.guidance)
