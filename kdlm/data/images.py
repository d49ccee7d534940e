"""Images and other samples of one shape, as rows of tensors."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdlm.data.cache import fingerprint
from kdlm.data.collate import stacked
from kdlm.data.load import Data
from kdlm.data.report import DataReport
from kdlm.section import Section


@dataclass(frozen=True)
class TensorRows:
    """Rows of tensors of equal length: what fits in memory, indexed like a data set."""

    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def select(self, indices: range) -> "TensorRows":
        """Return some of the rows."""
        at = torch.tensor(list(indices), dtype=torch.int64)
        return TensorRows({name: column[at] for name, column in self.columns.items()})


class ImagesSection(Section):
    """Images with their classes: `pixel_values` in [-1, 1], `labels`, `index`."""

    provides: ClassVar[frozenset[str]] = frozenset({"images", "samples"})
    """What a method may need of it."""

    name: Literal["images"] = "images"
    train: str = "sandbox:digits/train"
    """The training images."""
    eval: str | None = None
    """The images to evaluate on."""

    def load(self, seed: int) -> Data:
        """Return the splits. Raises ValueError when one is not there."""
        splits = {"train": self._rows(self.train)} | ({"eval": self._rows(self.eval)} if self.eval else {})
        notes = [f"{name}: {len(rows)} images" for name, rows in splits.items()]
        names = {name: fingerprint(getattr(self, name)) for name in splits}
        return Data(splits["train"], splits.get("eval"), stacked, DataReport([], notes=notes), names, {})

    def look(self) -> list[str]:
        """Return a line for each split. Raises ValueError when one is not there."""
        return [f"data: {key}: {path}" for key in ("train", "eval") if (path := getattr(self, key))]

    def _rows(self, path: str) -> TensorRows:
        from kdlm.sandbox.digits import digits

        kept = dict(zip(("sandbox:digits/train", "sandbox:digits/eval"), digits(), strict=True)).get(path)
        if kept is None:
            raise ValueError(f"{path}: no such images")
        index = torch.arange(len(kept.labels))
        return TensorRows({"pixel_values": kept.images * 2 - 1, "labels": kept.labels, "index": index})


class PointsSection(Section):
    """Points of the sandbox's ring: `samples` and `index`."""

    provides: ClassVar[frozenset[str]] = frozenset({"samples"})
    """What a method may need of it."""

    name: Literal["ring"] = "ring"
    rows: int = 4096
    """Points to train on."""
    eval_rows: int = 1024
    """Points to evaluate on."""

    def load(self, seed: int) -> Data:
        """Return the splits."""
        from kdlm.sandbox.ring import ring

        def rows(count: int, seed: int) -> TensorRows:
            return TensorRows({"samples": ring(count, seed=seed), "index": torch.arange(count)})

        names = {"train": fingerprint("ring", self.rows, seed), "eval": fingerprint("ring", self.eval_rows)}
        notes = [f"ring: {self.rows} points, {self.eval_rows} held out"]
        return Data(rows(self.rows, seed), rows(self.eval_rows, 10**6), stacked, DataReport([], notes=notes), names, {})

    def look(self) -> list[str]:
        """Return a line about the points."""
        return [f"data: ring, {self.rows} points"]
