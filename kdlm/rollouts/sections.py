"""What a recipe says about rollouts."""

from typing import Annotated, Literal

from pydantic import Field

from kdlm.rollouts.engine import Sampling
from kdlm.rollouts.environments import AnyEnvironment
from kdlm.rollouts.generate import GenerateSection
from kdlm.rollouts.unmask import UnmaskSection
from kdlm.rollouts.vllm_local import VLLMSection
from kdlm.rollouts.vllm_server import VLLMServerSection
from kdlm.section import Section

AnyEngine = Annotated[GenerateSection | UnmaskSection | VLLMSection | VLLMServerSection, Field(discriminator="name")]


class RolloutSection(Section):
    """How the student's own text is made while it trains."""

    engine: AnyEngine = GenerateSection()
    """What draws completions."""
    sampling: Sampling = Sampling()
    """How they are drawn."""
    environment: AnyEnvironment | None = None
    """What answers a completion and has the student go on, in turns; without it a completion is one turn."""
    informed: bool = False
    """Draw completions from prompts with the row's context in them (`data.context`); they are trained on after the
    prompts without it (pi-Distill). Evaluation draws from the latter."""
    every: int = Field(1, ge=1)
    """Optimiser steps whose prompts are completed together, with the weights of the first of them. More of them keep an
    engine busier; the later ones train on text of an older student."""
    reuse: int = Field(1, ge=1)
    """Times each completion is trained on, in passes over those of one generation."""
    asynchronous: bool = False
    """Complete the next generation's prompts while training on this one's: nobody waits, and text is older by one
    generation: never by more than `2 * every * reuse - 1` optimiser steps."""
    prompt_tokens: int | None = Field(None, ge=1)
    """Plain text has no prompt: so many of its first tokens are taken for one."""
    truncated: Literal["keep", "mask"] = "keep"
    """A completion that was cut at `max_new_tokens`: trained on like any other (it has no end token), or not at all."""
    show: int = Field(2, ge=0)
    """Completions looked at, token by token, for each line of the log: see `samples.html` in the run folder."""
    eval_prompts: int = Field(0, ge=0)
    """Evaluate also on the student's own completions of so many evaluation prompts, as `eval_rollout_*`."""

    @property
    def staleness(self) -> int:
        """The most optimiser steps that a completion's weights are behind those that train on it."""
        return (2 if self.asynchronous else 1) * self.every * self.reuse - 1


def check_engine(section: RolloutSection, *, masked: bool) -> None:
    """Raise ValueError where a masked language model is to write as causal ones do, or a causal one as it does."""
    if masked != isinstance(section.engine, UnmaskSection):
        kind, engine = ("a masked", "unmask") if masked else ("a causal", "generate, vllm or vllm_server")
        raise ValueError(
            f"rollouts.engine: {kind} language model does not write by {section.engine.name}: use {engine}"
        )
