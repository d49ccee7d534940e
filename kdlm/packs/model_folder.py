"""A model as a folder of safetensors, read one tensor at a time."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdlm.packs.tensor_files import DTYPES, Kind, as_bytes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BESIDE = (
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*.py",
    "LICENSE*",
)
"""What belongs to a model beside its weights."""
UNMERGED = (
    "holds an adapter, not a model; merge it into its base first: "
    "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
)


def open_model(given: str | Path) -> "ModelFolder":
    """Return a model by its folder, hub id, or `sandbox:code-teacher`. Raises ValueError when there is none."""
    if str(given).startswith("sandbox:"):
        from kdlm.models import named

        return ModelFolder(Path(named(str(given)).location()), str(given))
    if Path(given).is_dir():
        return ModelFolder(Path(given), str(given))
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        fetched = huggingface_hub.snapshot_download(
            str(given), allow_patterns=["*.safetensors", INDEX, *BESIDE], ignore_patterns=["*/*", "consolidated*"]
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{given}: there is no such folder, and no such model on the hub ({reason})") from error
    return ModelFolder(Path(fetched), str(given))


class ModelFolder:
    """The tensors of a folder that transformers wrote: one safetensors file, or several with an index.

    Attributes:
        called: what the user calls it, for messages.
        files: the names of the tensors in each file.

    Raises ValueError naming the file where there is no such model, or one of its files cannot be read.
    """

    def __init__(self, folder: Path, called: str):
        self.folder, self.called = folder, called
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            raise ValueError(f"{called}: {UNMERGED if adapter else 'not a model: there is no config.json'}")
        self._opened: dict[str, Any] = {}
        self.files = {file: list(self._open(file).keys()) for file in self._weight_files()}
        self._file_of = {name: file for file, names in self.files.items() for name in names}

    def _weight_files(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            return sorted(set(json.loads((self.folder / INDEX).read_text())["weight_map"].values()))
        if (self.folder / WEIGHTS).is_file():
            return [WEIGHTS]
        raise ValueError(
            f"{self.called}: neither {WEIGHTS} nor {INDEX} is there; save the model with transformers' save_pretrained"
        )

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder / file}: cannot be read ({error}); copy it anew") from error
        return self._opened[file]

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def kind(self, name: str) -> Kind:
        """Return data type and shape of a tensor without reading it. Raises ValueError for a type unknown here."""
        described = self._open(self._file_of[name]).get_slice(name)
        if described.get_dtype() not in DTYPES:
            raise ValueError(f"{self.called}: {name}: tensors of type {described.get_dtype()} are not supported")
        return described.get_dtype(), tuple(described.get_shape())

    def read(self, name: str) -> Tensor:
        """Return a tensor, mapped from the file."""
        return self._open(self._file_of[name]).get_tensor(name)

    def metadata(self, file: str) -> dict[str, str]:
        return self._open(file).metadata() or {}

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    @cached_property
    def digests(self) -> dict[str, str]:
        """A checksum of type, shape and all bytes of every tensor."""
        found = {}
        for name in self.names:
            dtype, shape = self.kind(name)
            digest = xxhash.xxh3_64(f"{dtype} {shape}".encode())
            digest.update(as_bytes(self.read(name)).numpy().data)
            found[name] = digest.hexdigest()
        return found

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the whole model: other weights, names or types give another, other shards the same."""
        digest = xxhash.xxh3_128()
        for name in sorted(self.digests):
            digest.update(f"{name} {self.digests[name]}\n".encode())
        return digest.hexdigest()
