"""What the student's own text takes: its cache of keys and values, the logits of a token, an engine beside it."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from kdlm.plan.ledger import Ledger, Work
from kdlm.plan.settings import Settings
from kdlm.rollouts import GenerateSection, RolloutSection
from kdlm.rollouts.vllm_local import VLLMSection


class Rollouts:
    """The rollouts of a recipe, without numbers.

    Attributes:
        completions: drawn for an optimiser step.
        together: of them, drawn at once by the engine `generate`.
    """

    def __init__(self, section: RolloutSection, student: Any, settings: Settings, ledger: Ledger):
        self.section, self.student, self.settings, self.ledger = section, student, settings, ledger
        self.completions = settings.batch * settings.accumulation
        self.together = min(section.engine.batch_size, self.completions) if self._here else 0
        self.held: Any = None
        with ledger.making("rollouts"):
            if self._here and section.asynchronous:
                self.held = copy.deepcopy(student)
            if isinstance(section.engine, VLLMSection) and not section.engine.sleep:
                self.held = self._share()

    @property
    def _here(self) -> bool:
        return isinstance(self.section.engine, GenerateSection)

    def _share(self) -> Tensor:
        """Return what vLLM takes of the device: weights, cache and graphs together."""
        share = self.section.engine.gpu_memory_utilization  # pyright: ignore[reportAttributeAccessIssue]
        return torch.empty(int(share * self.settings.device.memory), dtype=torch.uint8)

    def draw(self) -> None:
        """Hold what drawing takes at its end, when the cache is full; engines elsewhere take nothing."""
        if not self.together and not isinstance(self.section.engine, VLLMSection):
            return
        with self.ledger.phase("rollouts", "rollouts"), torch.no_grad():
            if isinstance(self.section.engine, VLLMSection):
                held = self._share() if self.section.engine.sleep else None
            else:
                held = self._generate()
            self._count(self.ledger.phases["rollouts"].work)
            del held

    def _generate(self) -> list[Tensor]:
        vocab = self.student.get_output_embeddings().weight.shape[0]
        prompt, new = self.settings.length - self._new, self._new
        ids = torch.ones(self.together, max(1, prompt), dtype=torch.int64)
        cache = self.student(input_ids=ids, attention_mask=ids, use_cache=True, logits_to_keep=1).past_key_values
        read = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        grown = [torch.cat([x, x.new_empty(*x.shape[:2], new, x.shape[3])], 2) for x in read]
        scores = [torch.empty(self.together, vocab) for _ in range(3)]  # logits, as they are filtered, probabilities
        return [*grown, *scores, torch.empty(self.together, vocab, dtype=torch.float64)]  # sums of probabilities

    def _count(self, work: Work) -> None:
        """Count reading all prompts and, token by token, all weights and the cache for each batch of completions."""
        batches = math.ceil(self.completions / (self.together or self.completions))
        parameters = list(self.student.parameters())
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        each = sum(parameter.numel() for parameter in parameters) * 2
        share = 1 / self.section.reuse
        cache = self.cache_bytes(self.completions) / 2  # on average it is half full
        new = self._new * share
        work.flops = (work.flops * batches * share) + each * self.completions * new
        work.bytes = (work.bytes * batches * share) + (size * batches + cache) * new
        work.calls = int(work.calls * batches * (share + new))

    @property
    def _new(self) -> int:
        return self.section.sampling.max_new_tokens

    def cache_bytes(self, completions: int) -> int:
        """Return the bytes of keys and values of so many completions at their end."""
        config = self.student.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        item = next(self.student.parameters()).element_size()
        return 2 * config.num_hidden_layers * heads * width * item * completions * self.settings.length

    def beside(self, ids: Tensor, batch: int) -> dict[str, Tensor]:
        """Return what a batch of the student's own text has beside its tokens."""
        each = torch.ones(batch, dtype=torch.int64)
        return {
            "sampled": torch.ones_like(ids, dtype=torch.bool),
            "turn": torch.zeros_like(ids),
            "log_probs": torch.empty(ids.shape),
            "sequence": torch.ones_like(ids),
            "truncated": each.bool(),
            "reward": each.float(),
            "turn_rewards": each.float()[:, None],
            "index": each,
        }
