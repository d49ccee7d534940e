"""MMD-DDM: fine-tune a few-step deterministic sampler of the model itself, through all of its steps."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from kdlm.diffusion import ODE, follow, guided, levels_of, over
from kdlm.methods.diffusion.beside import MMD
from kdlm.methods.diffusion.method import DiffusionMethod, WritingOptions, condition_of, draws_of
from kdlm.methods.method import Batch, Nets, Step, Terms


class MMDFineTuning(DiffusionMethod):
    """Bring the samples of a model's own few-step sampler to the data by MMD (MMD-DDM, arXiv 2301.07969).

    The gradient goes through every step of the sampler, and so does the memory of its activations.

    Args:
        times: of the student's own form, falling: the steps of DDIM.
        guidance: w of classifier-free guidance, in training as in sampling.
        mmd: what is minimised.
        **options: as `DiffusionMethod`.
    """

    paper = "arXiv 2301.07969"
    needs = frozenset({"samples"})

    def __init__(self, *, times: Sequence[float], guidance: float = 0.0, mmd: MMD | None = None, **options: Any):
        mmd = mmd or MMD()
        super().__init__(**{**options, "beside": [mmd, *options.get("beside", ())]})
        self.times, self.guidance = tuple(times), guidance
        if any(getattr(one, "layers", ()) for one in self.distances.values()):
            self.needs = self.needs | {"teacher.denoiser"}

    def sampler(self) -> ODE:
        return ODE(self.times, self.guidance, second_order=False)

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        draws, condition, student = draws_of(batch, step), condition_of(batch), nets["student"]
        levels = levels_of(student, self.times, len(draws.index), draws.index)
        noise = draws.normal("written 0", student.shape)
        samples = follow(
            lambda noised, level: guided(student, noised, level, condition, self.guidance),
            over(levels[0].scale, noise) * noise,
            levels,
            second_order=False,
        )
        return Terms(self.beside(nets, samples, batch, step))


class MMDFineTuningSection(WritingOptions):
    """A few-step sampler brought to the data by maximum mean discrepancy, through all of its steps."""

    method: ClassVar = MMDFineTuning
    name: Literal["mmd_ddm"] = "mmd_ddm"
    times: list[float] = Field(min_length=1)
    """Steps of the sampler, falling, in the student's own form."""
    guidance: float = Field(0.0, ge=0)
    """Scale w of the student's own guidance, `c + w (c - 0)`."""
    mmd: MMD = MMD()
    """What is minimised."""
