"""Images and other samples of one shape: what a recipe says about them, and the splits it becomes."""

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate

from kdlm.data.cache import fingerprint
from kdlm.data.collate import stacked
from kdlm.data.image_files import Columns, ImageSource, Table, decoded, normalisation_of, opened_images
from kdlm.data.load import Data
from kdlm.data.report import DataReport
from kdlm.data.tensor_rows import TensorRows
from kdlm.section import Section
from kdlm.signal import IGNORE_INDEX

SANDBOX = ("sandbox:digits/train", "sandbox:digits/eval")


class ImagesSection(Section):
    """Images with their classes: `pixel_values` (in [-1, 1] unless it says otherwise), `labels`, `index`."""

    provides: ClassVar[frozenset[str]] = frozenset({"images", "samples"})
    """What a method may need of it."""

    name: Literal["images"] = "images"
    train: str | ImageSource = SANDBOX[0]
    """The training images: a folder of images (a folder for each class), a parquet or arrow file, a folder that
    `save_to_disk` wrote, a hub id, or `sandbox:digits/train`."""
    eval: str | ImageSource | None = None
    """The images to evaluate on."""
    columns: Columns = {}
    """What kdlm calls a column -> what the source calls it, e.g. `{image: img, label: fine_label}`; by default the one
    that holds images, and `label` or `labels`."""
    size: int | None = Field(None, ge=1)
    """Height and width that images are cut (to a square) and scaled to. Without it all must have one size."""
    channels: Literal[1, 3] | None = None
    """1 is grey, 3 colour; by default what the first training image is."""
    mean: list[float] = Field([0.5], min_length=1)
    """Subtracted from values in [0, 1], of each channel or of all: with `std`, the defaults give values in [-1, 1]."""
    std: list[float] = Field([0.5], min_length=1)
    """Divides what is left."""
    processor: str | None = None
    """Hub id or folder of a model whose image processor says `mean` and `std`."""
    labelled: int | None = Field(None, ge=1)
    """Keep the labels of only so many training images, the same number of each class as nearly as can be; the others
    are images that a teacher can still be asked about."""
    labelled_seed: int = 0
    """Which ones. Not the run's seed, so that runs of different seeds learn from the same labels."""

    @model_validator(mode="after")
    def _normalised_once(self) -> "ImagesSection":
        if self.processor is not None and {"mean", "std"} & self.model_fields_set:
            raise ValueError("processor, and mean or std, both say how values are scaled: keep one")
        return self

    def load(self, seed: int) -> Data:
        """Return the splits. Raises ValueError when one is not there, has no images, no labels, or no single size."""
        tables = {name: self._table(source) for name, source in self._sources()}
        classes = tables["train"].classes
        if "eval" in tables and len(tables["eval"].classes) > len(classes):
            raise ValueError(f"data.eval: {len(tables['eval'].classes)} classes, and data.train has {len(classes)}")
        kept = self._kept(tables["train"].labels, len(classes))
        channels = self.channels or tables["train"].channels
        rows = {
            "train": self._rows(tables["train"], kept, channels),
            **({"eval": self._rows(tables["eval"], tables["eval"].labels, channels)} if "eval" in tables else {}),
        }
        notes = [f"{name}: {len(table.labels)} images of {len(classes)} classes" for name, table in tables.items()]
        if self.labelled is not None:
            notes.append(f"labels kept of {int((kept != IGNORE_INDEX).sum())} training images")
        options = self.model_dump(exclude={"train", "eval"})
        names = {name: fingerprint(table.fingerprint, options) for name, table in tables.items()}
        report = DataReport([], notes=notes)
        return Data(rows["train"], rows.get("eval"), stacked, report, names, {"classes": list(classes)})

    def look(self) -> list[str]:
        """Return a line for each split. Raises ValueError when one on this machine is not there or not of images."""
        lines = []
        for name, source in self._sources():
            try:
                table = self._table(source)
                lines.append(f"data: {name}: {source.path}, {len(table.labels)} images of {len(table.classes)} classes")
            except ValueError as error:
                if not source.may_be_on_hub:
                    raise ValueError(f"data.{name}: {error}") from error
                lines.append(f"data: {name}: {source.path} not looked at here ({error})")
        return lines

    def classes(self) -> list[str] | None:
        """Return the names of the training images' classes; None where they cannot be opened here."""
        try:
            return self._table(self._sources()[0][1]).classes
        except ValueError:
            return None

    def _sources(self) -> list[tuple[str, ImageSource]]:
        named = (("train", self.train), ("eval", self.eval))
        return [(name, ImageSource(path=s) if isinstance(s, str) else s) for name, s in named if s is not None]

    def _table(self, source: ImageSource) -> Table:
        return _digits(source) if source.path.startswith("sandbox:") else opened_images(source, self.columns)

    def _rows(self, table: Table, labels: np.ndarray, channels: int) -> Any:
        mean, std = (self.mean, self.std) if self.processor is None else normalisation_of(self.processor)
        if not isinstance(table.images, Tensor):
            return decoded(table, labels, channels, self.size, mean, std)
        images = table.images.expand(-1, channels, -1, -1)
        if self.size is not None:
            images = interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        scaled = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        numbers = torch.arange(len(labels))
        return TensorRows({"pixel_values": scaled, "labels": torch.as_tensor(labels), "index": numbers})

    def _kept(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Return the labels, all but `labelled` of them IGNORE_INDEX: turn by turn one of each class."""
        if self.labelled is None:
            return labels
        order = np.random.default_rng(self.labelled_seed).permutation(len(labels))
        order = order[labels[order] != IGNORE_INDEX]
        if self.labelled > len(order):
            raise ValueError(f"data.labelled: {self.labelled}, but only {len(order)} training images have a label")
        turn = np.zeros(len(order), dtype=np.int64)
        for one in range(classes):
            members = labels[order] == one
            turn[members] = np.arange(members.sum())
        chosen = order[np.argsort(turn, kind="stable")[: self.labelled]]
        kept = np.full_like(labels, IGNORE_INDEX)
        kept[chosen] = labels[chosen]
        return kept


def _digits(source: ImageSource) -> Table:
    from kdlm.sandbox.digits import digits

    if source.path not in SANDBOX:
        raise ValueError(f"{source.path}: no such images, the sandbox has {' and '.join(SANDBOX)}")
    kept = digits()[SANDBOX.index(source.path)]
    count = min(len(kept.labels), source.limit or len(kept.labels))
    names = [str(digit) for digit in range(10)]
    return Table(kept.images[:count], kept.labels[:count].numpy(), names, 1, fingerprint(source.path, count))


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
