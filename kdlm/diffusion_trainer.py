"""DiffusionTrainer: DistillTrainer for denoisers, whose evaluation looks at samples."""

from typing import Any

import torch
from torch import Tensor

from kdlm.diffusion import Condition, Draws
from kdlm.trainer import DistillTrainer

EVALUATION = -1
"""The step that evaluation draws its noise of: the same noise at every evaluation of a run, and no step's."""


class DiffusionTrainer(DistillTrainer):
    """Trains a denoiser with a method of `kdlm.methods.diffusion`.

    Args: as `DistillTrainer`, with denoisers for `model` and `teacher`. Rows have `samples` (or `pixel_values`) and
    `index`, and what they are of: `labels`, or the embeddings of prompts.
    """

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
        draws = Draws(torch.arange(count, device=self.args.device), self.args.seed, EVALUATION)
        was_training = getattr(network, "training", False)
        network.eval()
        try:
            return (sampler or self.method.sampler())(network, draws, condition)
        finally:
            network.train(was_training)
