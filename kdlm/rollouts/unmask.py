"""The engine `unmask`: a masked language model writes by filling in hidden tokens, step by step and block by block."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.models import mask_id_of
from kdlm.rollouts.engine import Sampling, end_ids
from kdlm.rollouts.generate import GenerateEngine, drawn_from, warpers_of
from kdlm.section import Section

Order = Literal["confidence", "random"]


class UnmaskEngine(GenerateEngine):
    """Hides `max_new_tokens` tokens behind a prompt and fills them in (LLaDA, arXiv 2502.09992, algorithms 4 and 5).

    A step asks the model once, draws a token for every hidden place of the block, and keeps some of them: those whose
    token the model finds likeliest, or any. Blocks are filled from left to right, so that `block=1` is the order of
    causal models. What is drawn after the first end token is dropped. The log-probability of a token is that of the
    step which kept it, as if its place had been chosen beforehand.

    Args:
        end_ids, pad_id, batch_size, copied: as of `GenerateEngine`.
        mask_id: the token that hides; it is never drawn.
        steps: in all; None fills one token a step.
        block: tokens of a block; None makes one block of all.
        order: which tokens a step keeps.
    """

    def __init__(
        self,
        end_ids: Sequence[int],
        pad_id: int,
        mask_id: int,
        *,
        steps: int | None = None,
        block: int | None = None,
        order: Order = "confidence",
        **options: Any,
    ):
        super().__init__(end_ids, pad_id, **options)
        self.mask_id, self.steps, self.block = mask_id, steps, block
        self.order: Order = order

    @torch.no_grad()
    def _draw(
        self, prompts: list[Sequence[int]], sampling: Sampling, context: int, seed: int
    ) -> list[tuple[list[int], list[float]]]:
        if sampling.teacher_share:
            raise ValueError("rollouts.sampling.teacher_share: the engine `unmask` draws from the student alone")
        longest = max(len(prompt) for prompt in prompts)
        length = min(sampling.max_new_tokens, context - longest)
        ids = torch.full((len(prompts), longest + length), self.pad_id)
        attention = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(list(prompt))
            ids[row, len(prompt) : len(prompt) + length] = self.mask_id
            attention[row, : len(prompt) + length] = 1
        device = self._model.device
        places = torch.tensor([len(prompt) for prompt in prompts])[:, None] + torch.arange(length)
        ids, attention, places = ids.to(device), attention.to(device), places.to(device)
        log_probs = torch.zeros(len(prompts), length, device=device)
        generator = torch.Generator(device).manual_seed(seed % 2**63)
        width = min(self.block or length, length)
        for start in range(0, length, width):
            block = slice(start, min(start + width, length))
            self._fill(ids, attention, places[:, block], log_probs[:, block], length, sampling, generator)
            written = ids.gather(1, places[:, : block.stop])
            if torch.isin(written, torch.tensor(self.end_ids, device=device)).any(-1).all():
                break
        written = ids.gather(1, places).tolist()
        return [self._ended(row, logs) for row, logs in zip(written, log_probs.tolist(), strict=True)]

    def _fill(
        self,
        ids: Int[Tensor, "rows whole"],
        attention: Int[Tensor, "rows whole"],
        places: Int[Tensor, "rows block"],
        log_probs: Float[Tensor, "rows block"],
        length: int,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> None:
        """Fill in a block, and note the log-probabilities, in place."""
        width = places.shape[1]
        steps = width if self.steps is None else min(width, -(-self.steps * width // length))
        left = width
        for step in range(steps):
            logits = self._model(input_ids=ids, attention_mask=attention).logits
            logits = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])).float()
            logits[..., self.mask_id] = -torch.inf
            drawn, logs, confidence = self._drawn(logits, sampling, generator)
            if self.order == "random":
                confidence = torch.rand(confidence.shape, generator=generator, device=confidence.device)
            hidden = ids.gather(1, places) == self.mask_id
            kept = -(-left // (steps - step))
            chosen = confidence.masked_fill(~hidden, -1.0).topk(kept, dim=-1).indices
            ids.scatter_(1, places.gather(1, chosen), drawn.gather(1, chosen))
            log_probs.scatter_(1, chosen, logs.gather(1, chosen))
            left -= kept

    def _drawn(
        self, logits: Float[Tensor, "rows block vocab"], sampling: Sampling, generator: torch.Generator
    ) -> tuple[Int[Tensor, "rows block"], Float[Tensor, "rows block"], Float[Tensor, "rows block"]]:
        """Return a token for each place, its log-probability as drawn, and its probability by the model's own law."""
        flat, shape = logits.flatten(0, 1), logits.shape[:2]
        own = flat.softmax(-1)
        p = warpers_of(sampling)(torch.empty(0), flat).softmax(-1)  # pyright: ignore[reportArgumentType]  none reads ids
        drawn = p.argmax(-1, keepdim=True) if sampling.temperature == 0 else drawn_from(p, generator)
        return drawn.view(shape), p.gather(-1, drawn).log().view(shape), own.gather(-1, drawn).view(shape)


class UnmaskSection(Section):
    """Iterative unmasking, for students that are masked language models, in this process."""

    name: Literal["unmask"] = "unmask"
    batch_size: int = Field(64, ge=1)
    """Completions drawn at once."""
    steps: int | None = Field(None, ge=1)
    """Steps in which a completion is written; by default one for each token."""
    block: int | None = Field(None, ge=1)
    """Tokens that are finished before the next ones are begun, from left to right; by default all are one block."""
    order: Order = "confidence"
    """Which tokens a step keeps of those that it draws: the likeliest, or any at random."""

    def build(self, student: Any, tokenizer: Any, device: torch.device, *, copied: bool) -> UnmaskEngine:
        """Return the engine; `copied` where it runs while the student trains."""
        mask_id = mask_id_of(student)
        assert mask_id is not None, "see check_engine"
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        options = {key: getattr(self, key) for key in ("steps", "block", "order", "batch_size")}
        return UnmaskEngine(sorted(end_ids(student, tokenizer)), pad, mask_id, copied=copied, **options)
