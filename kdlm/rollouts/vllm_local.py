"""The engine `vllm`: vLLM in the trainer's process, on its device."""

import copy
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy
import torch
from pydantic import Field

from kdlm.rollouts.engine import Completion, Sampling
from kdlm.rollouts.vllm_requests import Ends, completions, end_ids, requests
from kdlm.rollouts.weight_transfer import BACKEND, EXTENSION, one_process, warn_untested
from kdlm.rollouts.weights import named_weights, parameter_dtype
from kdlm.section import Section

QUIET = {
    "vllm.model_executor.model_loader.reload.layerwise": logging.ERROR,
    "vllm.v1.core.block_pool": logging.WARNING,
}
"""What vLLM says at every step: of its cache, and of layers without weights (that weights fail to come is an error)."""

OURS = frozenset(
    "model skip_tokenizer_init load_format dtype logprobs_mode generation_config weight_transfer_config "
    "worker_extension_cls gpu_memory_utilization max_model_len enable_sleep_mode tensor_parallel_size "
    "pipeline_parallel_size data_parallel_size".split()
)
"""Options of `vllm.LLM` that have a key of their own, or one value with which this engine works."""


class VLLMEngine:
    """Draws with a `vllm.LLM` that has weights of its own, taken tensor by tensor from the student's.

    The run's random numbers are not touched, but that on a CPU vLLM draws some of them where the student trains beside
    it.

    Args:
        llm: a `vllm.LLM` in this process, with kdlm's weight transfer.
        end_ids: tokens that end a completion.
        sleep: give the memory of weights and cache back to the training while nothing is asked.
        beside: the student trains, in another thread, while it draws.
    """

    lives = False

    def __init__(self, llm: Any, end_ids: frozenset[int], *, sleep: bool = False, beside: bool = False):
        self.llm, self.sleep, self.beside = llm, sleep, beside
        self.ends = Ends(end_ids, llm.llm_engine.model_config.max_model_len)
        self.llm.init_weight_transfer_engine({"init_info": {}})
        self._version: int | None = None
        self._asleep = False

    def take(self, student: Any, version: int) -> None:
        self._wake()
        with own_randomness():
            self.llm.start_weight_update()
            self.llm.update_weights({"update_info": {"tensors": named_weights(student)}})
            self.llm.finish_weight_update()
            self.llm.reset_prefix_cache()  # what it remembers of prompts was computed with the old weights
        self._version = version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        if self._version is None:
            raise RuntimeError("the engine has taken no weights yet: call take first")
        if not prompts:
            return []
        asked = [
            SamplingParams(**request, detokenize=False) for request in requests(prompts, sampling, seed, self.ends)
        ]
        self._wake()
        with nullcontext() if self.beside else own_randomness():  # beside it, to put them back would turn them back
            outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], asked, use_tqdm=False)
        if self.sleep:
            self.llm.sleep(1)
            self._asleep = True
        made: list[Completion] = []
        for place, output in enumerate(outputs):
            samples = [
                (
                    list(one.token_ids),
                    [entry[token].logprob for entry, token in zip(one.logprobs, one.token_ids, strict=True)],
                )
                for one in sorted(output.outputs, key=lambda one: one.index)
            ]
            made += completions(samples, place, sampling, self.ends, self._version)
        return made

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up()
            self._asleep = False


@contextmanager
def own_randomness() -> Iterator[None]:
    """Put the random numbers of Python, numpy and torch back to where they were: vLLM seeds and draws them."""
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


class VLLMSection(Section):
    """vLLM in the training's process, on its device: fast on a GPU, with memory for a second copy of the student."""

    name: Literal["vllm"] = "vllm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What it computes in; `auto` in the type of the student's weights."""
    gpu_memory_utilization: float = Field(0.3, gt=0, le=1)
    """Share of a GPU's memory for its weights and cache; the training has the rest."""
    max_model_len: int | None = Field(None, ge=2)
    """Most tokens of prompt and completion together: a smaller cache than the student's context would take."""
    sleep: bool = False
    """Give the GPU's memory back while the student trains."""
    options: dict[str, Any] = {}
    """Handed to `vllm.LLM`: enforce_eager, max_num_seqs ... Several GPUs are for the server."""

    def build(self, student: Any, tokenizer: Any, device: torch.device, *, copied: bool = False) -> VLLMEngine:
        """Start the engine, with the student's weights; `copied` where it draws while the student trains.

        Raises ValueError where vLLM is not installed, and where it cannot do what is asked.
        """
        one_process()
        if self.sleep and copied:
            raise ValueError("rollouts.engine.sleep: it sleeps while the student trains, and asynchronous draws then")
        if self.sleep and device.type != "cuda":
            raise ValueError(f"rollouts.engine.sleep: it frees a GPU's memory, and the student is on {device.type}")
        if ours := OURS & self.options.keys():
            raise ValueError(f"rollouts.engine.options: {', '.join(sorted(ours))} cannot be set in them")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: tensors are handed over
        try:
            from vllm import LLM, __version__  # pyright: ignore[reportMissingImports]
            from vllm.config import WeightTransferConfig  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"rollouts.engine: vllm cannot be imported ({error}): pip install 'kdlm[vllm]'") from error
        warn_untested(__version__)
        for name, level in QUIET.items():
            logging.getLogger(name).setLevel(level)
        dtype = self.dtype if self.dtype != "auto" else str(parameter_dtype(student)).removeprefix("torch.")
        with tempfile.TemporaryDirectory(prefix="kdlm-vllm-") as folder, own_randomness():
            base = student.get_base_model() if hasattr(student, "get_base_model") else student
            config = copy.deepcopy(base.config)
            config.architectures = [type(base).__name__]
            config.save_pretrained(folder)
            llm = LLM(
                model=folder,
                skip_tokenizer_init=True,  # ids go in and out
                load_format="dummy",  # the weights come from the student
                dtype=dtype,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                weight_transfer_config=WeightTransferConfig(backend=BACKEND),
                worker_extension_cls=EXTENSION,
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_model_len=self.max_model_len,
                enable_sleep_mode=self.sleep,
                **self.options,
            )
        engine = VLLMEngine(llm, end_ids(student, tokenizer), sleep=self.sleep, beside=copied)
        engine.take(student, 0)
        return engine
