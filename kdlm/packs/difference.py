"""What tuning changed: a tuned model less its base, tensor by tensor."""

import json
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.packs.model_folder import ModelFolder
from kdlm.packs.tensor_files import size_of

WIDE = ("F64", "F32", "F16", "BF16")
"""Types whose differences mean something."""
IRRELEVANT = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Keys of a config that tuning changes without changing what the model computes."""


class Difference:
    """The deltas of a tuned model (arXiv 2503.20110 calls them its diff vector).

    Attributes:
        changed: the tensors that tuning changed, in the order of the base's files.
        same_as: changed tensors that are byte for byte those of another, before and after tuning (a head tied to its
            embedding and saved twice), and that other.
        unchanged: the rest.

    Raises ValueError naming the tensor where the two are not of one architecture, or its delta has no meaning.
    """

    def __init__(self, tuned: ModelFolder, base: ModelFolder):
        self.tuned, self.base = tuned, base
        self.called = tuned.called
        self.changed: list[str] = []
        self.same_as: dict[str, str] = {}
        self.unchanged: list[str] = []
        first: dict[tuple[str, str], str] = {}
        for name in base.names:
            if name not in tuned:
                continue
            self._require_one_shape(name)
            digests = base.digests[name], tuned.digests[name]
            if digests[0] == digests[1] or self._same_numbers(name):
                self.unchanged.append(name)
            elif digests in first:
                self.same_as[name] = first[digests]
            else:
                first[digests] = name
                self.changed.append(name)
        self._place_one_sided()

    def _require_one_shape(self, name: str) -> None:
        (was, old), (now, new) = self.base.kind(name), self.tuned.kind(name)
        if old != new:
            rows = len(old) == len(new) > 1 and old[1:] == new[1:]
            mend = (
                "; where tokens were added, give the base as many rows (resize_token_embeddings, save_pretrained)"
                if rows
                else ": the two are not of one architecture"
            )
            raise ValueError(f"{name}: {list(old)} in {self.base.called}, {list(new)} in {self.tuned.called}{mend}")
        if (was not in WIDE or now not in WIDE) and self.base.digests[name] != self.tuned.digests[name]:
            raise ValueError(
                f"{name}: is {was} in {self.base.called} and {now} in {self.tuned.called}; deltas are taken of "
                "float64, float32, float16 and bfloat16: save both in one of these"
            )

    def _same_numbers(self, name: str) -> bool:
        """Return whether a tensor was merely saved in another type."""
        if self.base.kind(name)[0] == self.tuned.kind(name)[0]:
            return False
        return torch.equal(self.base.read(name).double(), self.tuned.read(name).double())

    def _place_one_sided(self) -> None:
        """Say of each tensor that only one of the two has whose copy it is."""
        sides = (self.base, self.tuned), (self.tuned, self.base)
        for having, lacking in sides:
            copies = {  # norms of one value are copies of one another by chance
                having.digests[name]: name for name in having.names if name in lacking and len(having.kind(name)[1]) > 1
            }
            for name in having.names:
                if name in lacking:
                    continue
                copied = copies.get(having.digests[name])
                if copied is None:
                    raise ValueError(
                        f"{name}: in {having.called} but not in {lacking.called}, and no copy of another tensor; save "
                        "both models with the same class and the same tied weights"
                    )
                if having is self.tuned:
                    continue  # a tied copy that the base does not store
                if copied in self.unchanged:
                    self.unchanged.append(name)
                else:
                    self.same_as[name] = self.same_as.get(copied, copied)

    @property
    def names(self) -> set[str]:
        """All tensors of the base."""
        return {*self.changed, *self.same_as, *self.unchanged}

    def delta(self, name: str) -> Float[Tensor, "..."] | None:
        """Return what tuning added to a tensor of the base, in float32; None where that is nothing.

        Raises ValueError naming the tensor where it is not finite.
        """
        name = self.same_as.get(name, name)
        if name not in self.tuned or self.base.digests[name] == self.tuned.digests[name]:
            return None
        tuned, base = self.tuned.read(name), self.base.read(name)
        delta = (tuned.double() - base.double()).float() if torch.float64 in (tuned.dtype, base.dtype) else None
        delta = tuned.float() - base.float() if delta is None else delta
        if not torch.isfinite(delta).all():
            raise ValueError(f"{name}: the difference of {self.tuned.called} and {self.base.called} is not finite")
        return delta

    @property
    def delta_bytes(self) -> int:
        """What the deltas occupy in the base's own data types."""
        return sum(size_of(self.base.kind(name)) for name in self.changed)

    def notes(self) -> Iterator[str]:
        """Yield what tuning changed beside the weights, which no delta holds."""
        base, tuned = self.base, self.tuned
        keys = [key for key in {**base.config, **tuned.config} if key not in IRRELEVANT]
        if other := sorted(key for key in keys if base.config.get(key) != tuned.config.get(key)):
            yield f"config.json differs in {', '.join(other)}; a merge takes the base's"
        for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            old, new = (self._text(model, file) for model in (base, tuned))
            if old != new:
                yield f"{file} differs; a merge takes the base's"

    @staticmethod
    def _text(model: ModelFolder, file: str) -> object:
        path = model.folder / file
        if not path.is_file():
            return None
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return text
        read = json.loads(text)
        return {key: value for key, value in read.items() if key not in IRRELEVANT} if isinstance(read, dict) else read
