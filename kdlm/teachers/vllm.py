"""A teacher that vLLM runs in this process: for capturing, and for training beside it where memory allows.

vLLM gives the k most probable tokens of a prompt's positions, or what the prompt's own tokens got; or, run as a pooling
model, the last hidden states, from which every divergence is exact. It never gives whole logits.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.models import AnySource, read_head
from kdlm.section import Section
from kdlm.signal import Head, Hidden, LogProbs, Rows, TopK
from kdlm.teachers.local import own_reading
from kdlm.teachers.openai import best_of, of_token
from kdlm.teachers.sequences import question_of
from kdlm.teachers.wire import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VLLMTeacher:
    """Answers a batch with the k best tokens of every kept row, with the text's own (k 0), or with hidden states.

    Args:
        engine: a `vllm.LLM`, run as a generating model for top-k, as a pooling model for hidden states.
        vocab_size: how many ids the model scores.
        k: tokens per row, 0 for the text's own token alone; or
        head: the model's head, for hidden states.
        name: what the model is called.
    """

    provides = frozenset({"teacher"})

    def __init__(self, engine: Any, vocab_size: int, *, k: int = 0, head: Head | None = None, name: str = ""):
        self.engine, self.vocab_size, self.k, self.name = engine, vocab_size, k, name
        self.head = head

    @property
    def signals(self) -> frozenset[type]:
        """The kind of signal it answers with."""
        return frozenset({Hidden if self.head is not None else TopK if self.k else LogProbs})

    def fingerprint(self) -> str:
        """Return what is known of the weights: the name of the model."""
        return self.name

    def __call__(self, batch: dict[str, Tensor], rows: Rows) -> TopK | LogProbs | Hidden:
        """Return the signal at the kept rows, on their device."""
        if "theirs" in batch:
            batch, rows = own_reading(batch, rows)
        question = question_of(batch)
        starts = (question.lengths.cumsum(0) - question.lengths).tolist()
        prompts = [
            question.ids[start : start + size].tolist()
            for start, size in zip(starts, question.lengths.tolist(), strict=True)
        ]
        device = rows.index.device
        if self.head is None:
            ids, log_probs = self._best(prompts, question)
            if not self.k:
                return LogProbs(log_probs[:, 0].to(device))
            return TopK(ids.to(device), log_probs.to(device))
        self.head = self.head.to(device)
        hidden = torch.cat(self.hidden(prompts))[question.rows]
        return Hidden(hidden.to(device, self.head.weight.dtype), self.head)

    def _best(self, prompts: Sequence[list[int]], question: Question) -> tuple[Tensor, Tensor]:
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=self.k, detokenize=False)
        # Entry t + 1 is what was said at t; nothing was said before the first token, nor is it asked after the last.
        said: list[Any] = []
        for output in self.engine.generate(_as_prompts(prompts), asked, use_tqdm=False):
            said += [*output.prompt_logprobs[1:], None]
        best = []
        for row in question.rows.tolist():
            entries = {str(token): {"logprob": one.logprob, "rank": one.rank} for token, one in said[row].items()}
            own = int(question.ids[row + 1])
            best.append(best_of(entries, self.k, self.vocab_size) if self.k else of_token(entries, own))
        width = max(1, self.k)
        ids = torch.tensor([ids for ids, _ in best], dtype=torch.int64).reshape(-1, width)
        return ids, torch.tensor([values for _, values in best]).reshape(-1, width)

    def hidden(self, prompts: Sequence[list[int]]) -> list[Float[Tensor, "tokens hidden"]]:
        """Return the last hidden states of sequences of token ids, on the CPU."""
        from vllm import PoolingParams

        asked = PoolingParams(use_activation=False)  # as they are, not normalised
        outputs = self.engine.encode(_as_prompts(prompts), asked, pooling_task="token_embed", use_tqdm=False)
        return [output.outputs.data for output in outputs]


def _as_prompts(sequences: Sequence[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in sequences]


class VLLMTeacherSection(Section):
    """A frozen model that vLLM runs in this process: top-k, the text's own tokens, or hidden states. For capturing."""

    provides: ClassVar[frozenset[str]] = VLLMTeacher.provides

    name: Literal["vllm"] = "vllm"
    of: AnySource
    """The model."""
    signal: Literal["top_k", "hidden"] = "top_k"
    """`top_k` asks for prompt log-probabilities; `hidden` gives its last hidden states, which are exact."""
    k: int = Field(128, ge=0)
    """Tokens per position, for `top_k`; 0 asks for the text's own token alone, which is all that `alm` wants."""
    options: dict[str, Any] = {}
    """Handed to `vllm.LLM`: tensor_parallel_size, gpu_memory_utilization, max_model_len, enforce_eager ..."""

    @property
    def signals(self) -> frozenset[type]:
        return frozenset({Hidden if self.signal == "hidden" else TopK if self.k else LogProbs})

    def build(self, device: torch.device) -> VLLMTeacher:
        """Start the engine. Raises ValueError where vLLM is not installed."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, as said
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError(f"teacher: vllm cannot be imported ({error}): pip install 'kdlm[vllm]'") from error
        where: dict[str, Any] = {"model": self.of.location(), "dtype": self.of.dtype}
        if (revision := getattr(self.of, "revision", None)) is not None:
            where["revision"] = revision
        where["trust_remote_code"] = self.of.trust_remote_code
        vocab_size = self.config().get_text_config().vocab_size
        if self.signal == "top_k":
            engine = LLM(**where, max_logprobs=self.k, **self.options)
            return VLLMTeacher(engine, vocab_size, k=self.k, name=self.of.describe())
        from vllm.config import PoolerConfig  # pyright: ignore[reportMissingImports]  comes with the import above

        pooler = PoolerConfig(task="token_embed", pooling_type="ALL", use_activation=False)
        engine = LLM(**where, runner="pooling", convert="embed", pooler_config=pooler, **self.options)
        return VLLMTeacher(engine, vocab_size, head=read_head(self.of), name=self.of.describe())

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.of.tokenizer()

    def config(self) -> Any:
        return self.of.config()

    def describe(self) -> str:
        """Return the name a reader knows this teacher by."""
        return f"{self.of.describe()} in vLLM ({self.signal})"
