"""The folder of a pack: `pack.json` says what it is of and how each delta is kept, `pack.safetensors` holds them."""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdlm.disk import digest_of_file
from kdlm.packs.compression import AnyCompressed, Shape, as_matrix
from kdlm.packs.model_folder import ModelFolder
from kdlm.packs.quantization import from_bits
from kdlm.section import Section

VERSION = 1
ABOUT, TENSORS = "pack.json", "pack.safetensors"


class Kept(Section):
    """How one delta is kept.

    Its rows that are all zeros are left out first (embeddings of tokens that tuning never saw); `rows` is how many
    remain.
    """

    shape: list[int]
    rows: int
    how: AnyCompressed | None
    """None: the budget had nothing for it."""
    relative_error: float
    """Frobenius norm of what is lost, over that of the delta: measured on what comes back."""
    bytes: int

    @property
    def whole(self) -> Shape:
        """Rows and columns of the delta as a matrix."""
        rows, columns = as_matrix(torch.empty(self.shape, device="meta")).shape
        return rows, columns

    @property
    def matrix(self) -> Shape:
        """Rows and columns of what is compressed."""
        return self.rows, self.whole[1]


class About(Section):
    """What a pack is of."""

    format: Literal[1] = VERSION
    base: str
    """Fingerprint of the model that the deltas belong to."""
    deltas: dict[str, Kept]
    same_as: dict[str, str]
    """Tensors that are copies of another in the base and in the tuned model, and that other."""
    unchanged: list[str]
    delta_bytes: int
    """What the deltas occupy uncompressed, in the base's own data types."""
    relative_error: float
    """Frobenius norm of all that is lost, over that of all deltas."""
    xxh3: str
    """Checksum of the tensors' file."""


class Pack:
    """Reads a pack. Raises ValueError naming the file where there is none, or it is damaged."""

    def __init__(self, folder: str | Path):
        self.folder, self.called = Path(folder), str(folder)
        path = self.folder / ABOUT
        if not path.is_file():
            raise ValueError(f"{folder}: not a pack: there is no {ABOUT}; make one with `kdlm pack`")
        try:
            self.about = About.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: not a pack that this kdlm reads: {place}: {first['msg']}") from error
        tensors = self.folder / TENSORS
        if not tensors.is_file() or digest_of_file(tensors) != self.about.xxh3:
            raise ValueError(f"{tensors}: is missing or damaged (its checksum differs); copy it anew, or pack again")
        try:
            self._opened = safe_open(tensors, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{tensors}: cannot be read: {error}") from error
        self._stored = set(self._opened.keys())

    @property
    def names(self) -> set[str]:
        """All tensors of the base."""
        return {*self.about.deltas, *self.about.same_as, *self.about.unchanged}

    @property
    def changed(self) -> set[str]:
        return {*self.about.deltas, *self.about.same_as}

    def require(self, base: ModelFolder) -> None:
        """Raise ValueError where the pack was made for another model."""
        if self.about.base != base.fingerprint:
            raise ValueError(
                f"{self.called} was made for another base than {base.called} (their fingerprints differ); "
                "--any-base puts it on all the same, where the shapes fit"
            )

    def delta(self, name: str) -> Float[Tensor, "..."] | None:
        """Return what the pack adds to a tensor, in float32; None where that is nothing."""
        name = self.about.same_as.get(name, name)
        kept = self.about.deltas.get(name)
        if kept is None or kept.how is None:
            return None
        coded = {
            part: self._opened.get_tensor(f"{name}:{part}")
            for part in ("codes", "steps", "mask")
            if f"{name}:{part}" in self._stored
        }
        matrix = kept.how.decode(coded, kept.matrix)
        if f"{name}:rows" in self._stored:
            matrix = with_rows(matrix, self._opened.get_tensor(f"{name}:rows"), kept.whole[0])
        return matrix.reshape(kept.shape)


def with_rows(matrix: Tensor, bits: Tensor, count: int) -> Tensor:
    """Return a matrix with the rows of zeros back in their places; a bit for each row says whether it was kept."""
    whole = torch.zeros(count, matrix.shape[1])
    whole[from_bits(bits, count)] = matrix
    return whole
