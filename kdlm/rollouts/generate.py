"""The engine `generate`: transformers' own generation, on any device, with the student itself or a copy of it."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kdlm.models import evaluating, whole
from kdlm.rollouts.engine import Completion, Sampling, check_prompts, end_ids
from kdlm.section import Section


class GenerateEngine:
    """Draws with `student.generate`, a batch of prompts of like length at a time.

    Random numbers come from a generator of its own: neither the run's nor those of another thread are touched.

    Args:
        end_ids: tokens that end a completion.
        pad_id: what fills prompts on the left; any id does.
        batch_size: completions drawn at once.
        copied: keep a copy of the student, which can be asked while the student trains.

    Attributes:
        guide: the model that `Sampling.teacher_share` draws from.
    """

    def __init__(self, end_ids: Sequence[int], pad_id: int, *, batch_size: int = 64, copied: bool = False):
        self.end_ids, self.pad_id, self.batch_size = list(end_ids), pad_id, batch_size
        self.lives = not copied
        self.guide: Any = None
        self._model: Any = None
        self._version = 0

    def take(self, student: Any, version: int) -> None:
        self._version = version
        if self.lives:
            self._model = student
        elif self._model is None:
            self._model = copy.deepcopy(student).eval().requires_grad_(False)
        else:
            self._as_placed(next(student.parameters()))
            with torch.no_grad():
                for ours, theirs in zip(self._model.parameters(), student.parameters(), strict=True):
                    ours.copy_(whole(theirs))
                for ours, theirs in zip(self._model.buffers(), student.buffers(), strict=True):
                    ours.copy_(theirs)

    def _as_placed(self, weight: Tensor) -> None:
        """Put the copy where the student is by now, in its precision: DeepSpeed moves and casts what it trains."""
        ours = next(self._model.parameters())
        if (ours.device, ours.dtype) != (weight.device, weight.dtype):
            self._model.to(weight.device, weight.dtype)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        if self._model is None:
            raise RuntimeError("the engine has taken no weights yet: call take first")
        context = context_of(self._model)
        asked = [place for place in range(len(prompts)) for _ in range(sampling.samples_per_prompt)]
        check_prompts(prompts, context)
        by_length = sorted(range(len(asked)), key=lambda number: len(prompts[asked[number]]))
        done: dict[int, Completion] = {}
        with evaluating(self._model):
            for start in range(0, len(by_length), self.batch_size):
                numbers = by_length[start : start + self.batch_size]
                drawn = self._draw([prompts[asked[n]] for n in numbers], sampling, context, seed * 1_000_003 + start)
                for number, (ids, log_probs) in zip(numbers, drawn, strict=True):
                    stop: Literal["end", "length"] = "end" if ids and ids[-1] in self.end_ids else "length"
                    done[number] = Completion(ids, log_probs, stop, asked[number], self._version)
        return [done[number] for number in range(len(asked))]

    def close(self) -> None:
        self._model = None

    @torch.no_grad()
    def _draw(
        self, prompts: list[Sequence[int]], sampling: Sampling, context: int, seed: int
    ) -> list[tuple[list[int], list[float]]]:
        device = self._model.device
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for number, prompt in enumerate(prompts):
            ids[number, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask[number, longest - len(prompt) :] = 1
        guide = _Guide(self.guide, mask.to(device)) if sampling.teacher_share else None
        drawing = _Drawing(sampling, torch.Generator(device).manual_seed(seed % 2**63), guide)
        plain = GenerationConfig(
            max_new_tokens=min(sampling.max_new_tokens, context - longest),
            do_sample=False,  # the drawing is done by the processor, with a generator of its own
            eos_token_id=self.end_ids,
            pad_token_id=self.pad_id,
        )
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        own, base.generation_config = base.generation_config, plain  # penalties and the like that it brings are no law
        ids, mask = ids.to(device), mask.to(device)
        try:
            with torch.cuda.device_of(ids):  # each thread has a current GPU of its own, at first the first one
                whole = self._model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=plain,
                    logits_processor=LogitsProcessorList([drawing]),
                )
        finally:
            base.generation_config = own
        log_probs = torch.stack(drawing.log_probs, 1).tolist()
        return [self._ended(row, logs) for row, logs in zip(whole[:, longest:].tolist(), log_probs, strict=True)]

    def _ended(self, ids: list[int], log_probs: list[float]) -> tuple[list[int], list[float]]:
        end = next((place + 1 for place, token in enumerate(ids) if token in self.end_ids), len(ids))
        return ids[:end], log_probs[:end]


class _Drawing(LogitsProcessor):
    """Draws each token itself, notes its log-probability, and leaves it as the only one to choose."""

    def __init__(self, sampling: Sampling, generator: torch.Generator, guide: "_Guide | None"):
        self.greedy, self.generator = sampling.temperature == 0, generator
        self.guide, self.share = guide, sampling.teacher_share
        self.log_probs: list[Tensor] = []
        self.warpers = warpers_of(sampling)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        p = torch.softmax(self.warpers(input_ids, scores.float()), dim=-1)
        if self.guide is not None:
            theirs = self.guide(input_ids)[:, : p.shape[-1]].float()  # heads are padded to different sizes
            p = p * (1 - self.share)
            p[:, : theirs.shape[-1]] += self.share * torch.softmax(self.warpers(input_ids, theirs), dim=-1)
        drawn = p.argmax(-1, keepdim=True) if self.greedy else drawn_from(p, self.generator)
        self.log_probs.append(p.gather(-1, drawn).squeeze(-1).log())
        return scores.scatter_(-1, drawn, torch.inf)  # generate's own copy of the logits, of which it takes the largest


class _Guide:
    """A second model that reads along, a token at a time; its prompts are padded on the left as the first one's."""

    def __init__(self, model: Any, mask: Tensor):
        self.model, self.mask, self.cache = model, mask, None

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the logits of the token that follows `ids` [rows, so far]."""
        new = ids if self.cache is None else ids[:, -1:]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), ids.shape[1] - self.mask.shape[1])], 1)
        places = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        said = self.model(
            input_ids=new, attention_mask=self.mask, position_ids=places, past_key_values=self.cache, use_cache=True
        )
        self.cache = said.past_key_values
        return said.logits[:, -1]


def warpers_of(sampling: Sampling) -> LogitsProcessorList:
    """Return what turns logits into those that are drawn from: temperature, `top_k`, `top_p`; at 0 nothing."""
    warpers: list[Any] = []
    if sampling.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.temperature and sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.temperature and sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList(warpers)


def drawn_from(p: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an index from each row of probabilities [rows, vocab]; returns [rows, 1].

    Inverts the cumulative distribution: one random number for a row, where `torch.multinomial` takes one for an entry.
    """
    # In fp32 the sums would round away what is below 6e-8; Apple's GPUs know no fp64.
    dtype = torch.float32 if p.device.type == "mps" else torch.float64
    sums = p.cumsum(-1, dtype=dtype)
    point = torch.rand(len(p), 1, dtype=dtype, device=p.device, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, point, right=True).clamp_(max=p.shape[-1] - 1)  # right: skips what has no mass


def context_of(model: Any) -> int:
    """Return how many tokens a model can read; a large number where it does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


class GenerateSection(Section):
    """transformers' own generation with the student in this process: slow, and on any device."""

    name: Literal["generate"] = "generate"
    batch_size: int = Field(64, ge=1)
    """Completions drawn at once."""

    def build(self, student: Any, tokenizer: Any, device: torch.device, *, copied: bool) -> GenerateEngine:
        """Return the engine; `copied` where it runs while the student trains."""
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return GenerateEngine(sorted(end_ids(student, tokenizer)), pad, batch_size=self.batch_size, copied=copied)
