"""Denoiser: any diffusion or flow model as one function, (x_t, level, condition) -> prediction of x_0."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdlm.diffusion.forms import Form
from kdlm.diffusion.level import Level, over
from kdlm.features import recorded

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
"""What a network's output means: the noise e, alpha e - sigma x_0, x_0, or e - x_0."""
Condition = dict[str, Tensor]
"""What a sample is made for, by the name that the batch has for it: `labels`, or the embeddings of a prompt."""
CONFIG, WEIGHTS = "denoiser.json", "model.safetensors"


class Denoiser(nn.Module):
    """Base of all denoisers: takes `x_t` of any level, and hands it to the network in the network's own form.

    A subclass gives `predict`, and `form`, `prediction`, `shape` as attributes.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"teacher.denoiser"})
    form: Form
    """The path of noise levels that the network was trained on."""
    prediction: Prediction
    """What the network's output means."""
    shape: tuple[int, ...]
    """Of one sample."""
    takes_guidance: bool = False
    """Whether the scale of guidance is an input of the network (arXiv 2210.03142)."""

    def predict(
        self, noised: Tensor, time: Float[Tensor, "batch"], condition: Condition | None, guidance: Tensor | None
    ) -> Tensor:
        """Return the network's own output at `x_t` and `time` of its own form."""
        raise NotImplementedError

    def unconditional(self, condition: Condition) -> Condition:
        """Return the condition that stands for none, of the same batch. Raises ValueError where there is none."""
        raise ValueError(f"{type(self).__name__} was not trained without a condition, which guidance compares with")

    def blank(self) -> Condition | None:
        """Return a condition of one sample, whatever it says, for those who only ask for shapes; None may be one."""
        return None

    def with_guidance(self) -> "Denoiser":
        """Return a copy that takes a guidance scale, and answers as this one does whatever the scale, until trained.

        Raises ValueError where the network has no place for it.
        """
        raise ValueError(f"{type(self).__name__} cannot be given a guidance scale as an input")

    def forward(
        self,
        noised: Float[Tensor, "batch *shape"],
        level: Level,
        condition: Condition | None = None,
        *,
        guidance: Float[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """Return the prediction of x_0, in at least float32, in the graph of whatever is live.

        Args:
            noised: `alpha x_0 + sigma e`.
            level: its alpha and sigma, on any path.
            condition: what the samples are of.
            guidance: the scale w that a guidance-distilled network takes as an input (see `guided`).

        Raises ValueError for a guidance scale that the network does not take.
        """
        if guidance is not None and not self.takes_guidance:
            raise ValueError(f"this {type(self).__name__} takes no guidance scale: `student.guided: true` gives it one")
        time = self.form.time(level)
        own = self.form.level(time)
        wide = torch.promote_types(noised.dtype, torch.float32)
        noised = over(own.scale / level.scale, noised) * noised.to(wide)
        output = self.predict(noised, time, condition, guidance).to(wide)
        return clean_of(output, noised, own, self.prediction)

    def with_features(
        self, noised: Tensor, level: Level, condition: Condition | None, paths: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the prediction of x_0 and what the modules at `paths` returned. Raises ValueError for a wrong path."""
        with recorded(self, paths) as features:
            clean = self(noised, level, condition)
        return clean, features

    def configuration(self) -> dict[str, Any]:
        """Return what `load_denoiser` needs to build the network again: `kind` and its arguments."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the network as a folder that `load_denoiser` opens."""
        self.write_configuration(folder)
        weights = self.state_dict() if state_dict is None else state_dict
        safetensors.torch.save_file({k: value.contiguous() for k, value in weights.items()}, Path(folder) / WEIGHTS)

    def write_configuration(self, folder: str | Path) -> None:
        """Create the folder and write `denoiser.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.configuration(), indent=1) + "\n"
        (Path(folder) / CONFIG).write_text(text, encoding="utf-8")

    def load_weights(self, folder: Path) -> None:
        """Read the weights that `save_pretrained` wrote."""
        self.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))


def clean_of(output: Tensor, noised: Tensor, level: Level, prediction: Prediction) -> Tensor:
    """Return the x_0 that a network's output means at `x_t` and a level of its own form."""
    alpha, sigma = over(level.alpha, noised), over(level.sigma, noised)
    match prediction:
        case "sample":
            return output
        case "epsilon":
            return (noised - sigma * output) / alpha
        case "v_prediction":  # v = alpha e - sigma x_0
            return (alpha * noised - sigma * output) / (alpha.square() + sigma.square())
        case "flow":  # e - x_0
            return (noised - sigma * output) / (alpha + sigma)


def guided(
    denoiser: Any, noised: Tensor, level: Level, condition: Condition | None, scale: float | Tensor
) -> Float[Tensor, "batch *shape"]:
    """Return the prediction of x_0 under classifier-free guidance: `c + w (c - 0)` (arXiv 2207.12598).

    w = 0 is the conditional prediction, asked for once. Libraries whose scale is `0 + w (c - 0)` call it w + 1.

    Args:
        scale: w, one for all or one for each sample.
    """
    conditional = denoiser(noised, level, condition)
    if condition is None or (not isinstance(scale, Tensor) and scale == 0):
        return conditional
    free = denoiser(noised, level, denoiser.unconditional(condition))
    weight = over(scale, noised) if isinstance(scale, Tensor) else scale
    return conditional + weight * (conditional - free)
