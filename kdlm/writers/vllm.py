"""The writer `vllm`: vLLM in this process, for models of this machine on its GPUs."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal

from pydantic import Field

from kdlm.models import named
from kdlm.writers.weights import Prompts, version_of
from kdlm.writers.writer import Answered, Asked, Refused, Text, WriterSection

OURS = frozenset("model revision dtype gpu_memory_utilization max_model_len logprobs_mode".split())
"""Options of `vllm.LLM` that have a key of their own, or one value with which this writer works."""


class VLLMWriter:
    """Hands requests to a `vllm.LLM`, `at_once` of them together, each with its own seed.

    Which share a batch decides the last bits of what is computed, and so, where two tokens are about as probable, what
    is drawn. Log-probabilities are those of the distribution that is drawn from.
    """

    choices = 1

    def __init__(self, llm: Any, tokenizer: Any, about: tuple[str, str | None], section: "VLLMWriterSection"):
        self.model, self.revision = about
        self.llm, self.at_once = llm, section.batch_size
        self.prompts = Prompts(tokenizer, section.chat_template_args)
        self.context: int = llm.llm_engine.model_config.max_model_len

    def write(self, asked: Iterable[Asked]) -> Iterator[tuple[int, Answered | Refused]]:
        numbered = enumerate(asked)
        while batch := list(islice(numbered, self.at_once)):
            yield from self._together(batch)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def _together(self, batch: list[tuple[int, Asked]]) -> Iterator[tuple[int, Answered | Refused]]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        prompts, refused = self.prompts.ids(batch, self.context)
        yield from refused.items()
        asked = dict(batch)
        params = [SamplingParams(**self._params(asked[place], len(ids))) for place, ids in prompts.items()]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts.values()], params, use_tqdm=False)
        for (place, ids), output in zip(prompts.items(), outputs, strict=True):
            one = output.outputs[0]
            values = None
            if asked[place].log_probs:
                values = [entry[token].logprob for entry, token in zip(one.logprobs, one.token_ids, strict=True)]
            stop: Literal["end", "length"] = "length" if one.finish_reason == "length" else "end"
            yield place, Answered([Text(one.text, stop, len(one.token_ids), values)], len(ids))

    def _params(self, asked: Asked, length: int) -> dict[str, Any]:
        sampling = asked.sampling
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": min(sampling.max_new_tokens, self.context - length),
            "seed": asked.seed,
            "logprobs": 0 if asked.log_probs else None,  # that of the token itself
        }


class VLLMWriterSection(WriterSection):
    """vLLM in this process."""

    name: Literal["vllm"] = "vllm"
    path: str
    """Hub id, folder, or `sandbox:code-teacher`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What it computes in; `auto` takes the checkpoint's own."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory for its weights and cache."""
    max_model_len: int | None = Field(None, ge=2)
    """Most tokens of prompt and completion together; by default as many as the model has positions."""
    batch_size: int = Field(1024, ge=1)
    """Completions asked for together: a kill loses those that are under way, and each batch ends with its longest."""
    chat_template_args: dict[str, Any] = {}
    """Variables for the chat template, e.g. `{enable_thinking: false}`."""
    options: dict[str, Any] = {}
    """Handed to `vllm.LLM`: tensor_parallel_size, quantization, enforce_eager ..."""

    def identity(self) -> dict[str, Any]:
        left_out = {"name", "path", "revision", "gpu_memory_utilization"}
        said = self.model_dump(mode="json", exclude=left_out)
        return {"model": self.path, "revision": version_of(self.path, self.revision), "engine": "vllm", **said}

    def open(self, place: str) -> VLLMWriter:
        if ours := OURS & self.options.keys():
            raise ValueError(f"{place}.options: {', '.join(sorted(ours))} cannot be set in them")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine ends with this process
        try:
            from vllm import LLM  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"{place}: vllm cannot be imported ({error}): pip install 'kdlm[vllm]'") from error
        try:
            source: Any = named(self.path, **({} if self.revision is None else {"revision": self.revision}))
            tokenizer = source.tokenizer()
        except ValueError as error:
            raise ValueError(f"{place}.path: {error}") from error
        llm = LLM(
            model=source.location(),
            revision=self.revision,
            dtype=self.dtype,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self.max_model_len,
            logprobs_mode="processed_logprobs",
            **self.options,
        )
        return VLLMWriter(llm, tokenizer, (self.path, version_of(self.path, self.revision)), self)
