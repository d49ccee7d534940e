"""The models of a job: in this process, in vLLM, or behind a server, each as an `LM` of lm-evaluation-harness."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from kdlm.jobs.digests import digest, digest_of_folder, size_of_folder
from kdlm.models import Loading, device_of, named
from kdlm.remote import Endpoint, Passing, Remote, ServerUnavailable
from kdlm.section import Section
from kdlm.section_loader import suggestion
from kdlm.server_options import ServerOptions, key_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Role = Literal["student", "teacher", "baseline", "other"]


class Evaluated(Section):
    """What every model of a job has."""

    role: Role = "other"
    """What it is compared as: a student with each baseline and teacher."""

    def identity(self, place: str, memory: Path | None) -> dict[str, Any]:
        """Return what the answers depend on, as plain data; raises ValueError naming `place` where it is not there."""
        raise NotImplementedError

    def about(self, lm: Any) -> dict[str, Any]:
        """Return `parameters` and `bytes` of an opened model, None where they are not known."""
        return {"parameters": None, "bytes": None}

    def open(self, place: str, batch_size: int | str, seed: int) -> Any:
        """Return the model as lm-evaluation-harness asks it."""
        raise NotImplementedError

    def told(self) -> dict[str, str]:
        """Return where tasks that count or cut tokens find the model's tokenizer: `pretrained` and `tokenizer`."""
        raise NotImplementedError


class InProcess(Evaluated, Loading):
    """A model in this process, by transformers."""

    name: Literal["hf"] = "hf"
    path: str
    """Hub id, folder (`runs/quickstart/forward-kl-0/student`), or `sandbox:code-teacher`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """Hub id or folder of a peft adapter to put on it."""
    device: str = "auto"
    """`cuda:1`, `cpu`, or `auto`: a GPU where there is one."""
    max_length: int | None = Field(None, ge=2)
    """Most tokens read at once; by default as many as the model has positions."""

    def source(self, place: str) -> Any:
        """Return where the weights come from. Raises ValueError for a sandbox model that there is not."""
        options = {key: getattr(self, key) for key in Loading.model_fields}
        try:
            return named(self.path, **options, **({} if self.revision is None else {"revision": self.revision}))
        except ValueError as error:
            raise ValueError(f"{place}.path: {error}") from error

    def identity(self, place: str, memory: Path | None) -> dict[str, Any]:
        weights = _weights(self.source(place), place, memory)
        adapter = self.adapter and _weights(named(self.adapter), place, memory)
        settings = {key: getattr(self, key) for key in ("dtype", "attention", "quantization", "max_length")}
        return {"name": self.name, "weights": weights, "adapter": adapter, **settings}

    def tokenizer(self, place: str) -> "PreTrainedTokenizerBase":
        """Open the tokenizer. Raises ValueError naming the key."""
        return _naming(place, self.source(place).tokenizer)

    def rows_of_head(self, place: str) -> int:
        """Return how many ids the model scores. Raises ValueError naming the key."""
        return _naming(place, self.source(place).config).get_text_config().vocab_size

    def load(self, place: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Open weights and tokenizer, on the device, ready to be asked. Raises ValueError naming the key."""
        source: Any = self.source(place)
        try:
            device = device_of(self.device)
        except ValueError as error:
            raise ValueError(f"{place}.device: {error}") from error
        options = {} if self.quantization == "none" else {"device_map": {"": device}}
        model: Any = _naming(place, lambda: source.load(**options))
        if self.quantization == "none":
            model = model.to(device)
        if self.adapter is not None:
            from peft import PeftModel

            try:
                model = PeftModel.from_pretrained(model, self.adapter)
            except (OSError, ValueError, RuntimeError) as error:
                raise ValueError(f"{place}.adapter: {self.adapter}: {str(error).splitlines()[0]}") from error
        return model.eval(), self.tokenizer(place)

    def about(self, lm: Any) -> dict[str, Any]:
        parameters = sum(parameter.numel() for parameter in lm.model.parameters())
        return {"parameters": parameters, "bytes": self.bytes()}

    def bytes(self) -> int | None:
        """Return how much disk the weights take, None where they are not in a folder of this machine."""
        folder = local_folder(self.source("models"))
        return None if folder is None else size_of_folder(folder)

    def open(self, place: str, batch_size: int | str, seed: int) -> Any:
        from kdlm.jobs.lms import hf

        model, tokenizer = self.load(place)
        return hf(model, tokenizer, batch_size, self.max_length)

    def told(self) -> dict[str, str]:
        return dict.fromkeys(("pretrained", "tokenizer"), self.source("models").location())


class VLLM(Evaluated):
    """A model in vLLM, in this process."""

    name: Literal["vllm"] = "vllm"
    path: str
    """Hub id, folder, or `sandbox:code-teacher`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What it computes in; `auto` takes the checkpoint's own."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory for its weights and cache."""
    max_length: int | None = Field(None, ge=2)
    """Most tokens of prompt and answer together; by default as many as the model has positions."""
    options: dict[str, Any] = {}
    """Handed to `vllm.LLM`: tensor_parallel_size, quantization, enforce_eager ..."""

    def identity(self, place: str, memory: Path | None) -> dict[str, Any]:
        weights = _weights(self._source(place), place, memory)
        return {
            "name": self.name,
            "weights": weights,
            "dtype": self.dtype,
            "max_length": self.max_length,
            "options": self.options,
        }

    def open(self, place: str, batch_size: int | str, seed: int) -> Any:
        from kdlm.jobs.lms import vllm

        try:
            return vllm(
                self._source(place).location(),
                revision=self.revision,
                dtype=self.dtype,
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_model_len=self.max_length,
                batch_size="auto",
                seed=seed,
                **self.options,
            )
        except ImportError as error:
            raise ValueError(f"{place}: vllm cannot be imported ({error}): pip install 'kdlm[vllm]'") from error

    def _source(self, place: str) -> Any:
        try:
            return named(self.path, **({} if self.revision is None else {"revision": self.revision}))
        except ValueError as error:
            raise ValueError(f"{place}.path: {error}") from error

    def about(self, lm: Any) -> dict[str, Any]:
        folder = local_folder(self._source("models"))
        return {"parameters": None, "bytes": None if folder is None else size_of_folder(folder)}

    def told(self) -> dict[str, str]:
        return dict.fromkeys(("pretrained", "tokenizer"), self._source("models").location())


class Server(Evaluated, ServerOptions):
    """A model behind a server with OpenAI's API: vLLM, llama.cpp, or a vendor's."""

    name: Literal["server"] = "server"
    model: str
    """The name the server knows it by."""
    tokenizer: str | None = None
    """Hub id, folder, or `sandbox:code-teacher`, whose tokenizer is the model's: tokens are made here. Not needed with
    `chat`."""
    chat: bool = False
    """Ask the chat endpoint, which answers in text only: tasks that compare log-probabilities do not work there."""
    max_length: int | None = Field(None, ge=3)
    """Most tokens that it takes; by default what the server says (vLLM does), else 2048."""
    timeout: float = Field(300.0, gt=0)
    """Seconds that one try may take."""
    patience: float = Field(30.0, gt=0)
    """Seconds that a request is tried for before the job ends for want of an answer."""

    def remote(self, place: str) -> Remote:
        """Return what asks the server. Raises ValueError without the key."""
        key = None if self.key_env is None else key_in(self.key_env, f"{place}.key_env")
        return Remote(Endpoint(self.url.rstrip("/"), key, self.timeout, self.patience, place=f"{place}.url"))

    def served(self, place: str) -> dict[str, Any]:
        """Return what the server says of the model. Raises ValueError when it is away or has no such model."""
        remote = self.remote(place)
        try:
            said = json.loads(remote.request("GET", "/v1/models", limit=1 << 20))
            models = {model["id"]: model for model in said["data"]}
        except (ServerUnavailable, Passing) as error:
            raise ValueError(str(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{place}.url: {self.url}/v1/models is not a list of models, as OpenAI's API has"
            ) from error
        finally:
            remote.close()
        if self.model not in models:
            close = suggestion(self.model, list(models)) or "."
            known = ", ".join(models) or "nothing"
            raise ValueError(f"{place}.model: {self.url} serves no {self.model!r}{close} It serves {known}")
        return models[self.model]

    def identity(self, place: str, memory: Path | None) -> dict[str, Any]:
        served = {key: value for key, value in self.served(place).items() if key in ("root", "parent", "max_model_len")}
        settings = {key: getattr(self, key) for key in ("name", "url", "model", "tokenizer", "chat", "max_length")}
        return settings | {"served": served}

    def open(self, place: str, batch_size: int | str, seed: int) -> Any:
        from kdlm.jobs.lms import server

        if self.tokenizer is None and not self.chat:
            raise ValueError(
                f"{place}.tokenizer: missing: hub id or folder of the model's tokenizer, or set chat: true"
            )
        key = None if self.key_env is None else key_in(self.key_env, f"{place}.key_env")
        return server(
            self,
            None if self.tokenizer is None else named(self.tokenizer),
            key,
            max_length=self.max_length or self.served(place).get("max_model_len") or 2048,
            batch_size=batch_size,
            seed=seed,
        )

    def told(self) -> dict[str, str]:
        return {} if self.tokenizer is None else {"tokenizer": named(self.tokenizer).location()}


AnyEvaluated = Annotated[InProcess | VLLM | Server, Field(discriminator="name")]
"""A model of a job, chosen by its `name`."""


def local_folder(source: Any) -> Path | None:
    """Return the folder that holds a model's files, None for one of a hub."""
    folder = Path(source.location()).expanduser()
    return folder if folder.is_dir() else None


def _naming(place: str, open_it: Callable[[], Any]) -> Any:
    try:
        return open_it()
    except ValueError as error:
        raise ValueError(f"{place}.path: {error}") from error


def _weights(source: Any, place: str, memory: Path | None) -> str:
    """Return the digest of a model's files, or its commit on the hub. Raises ValueError when it is not there."""
    if (folder := local_folder(source)) is None:
        config = _naming(place, source.config)
        return f"{source.describe()}@{config._commit_hash}"
    base = folder / "adapter_config.json"
    below = [] if not base.is_file() else [json.loads(base.read_text()).get("base_model_name_or_path")]
    parts = [digest_of_folder(folder, memory), *(_weights(named(path), place, memory) for path in below if path)]
    return parts[0] if len(parts) == 1 else digest(parts)
