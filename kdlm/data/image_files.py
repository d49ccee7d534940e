"""Image files: folders, parquet, arrow and hub sets of images through `datasets`, decoded by PIL as they are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.data.sections import Source
from kdlm.data.sources import HUB_ID, _load, _load_folder, _near
from kdlm.section import Section
from kdlm.signal import IGNORE_INDEX

Columns = dict[Literal["image", "label"], str]


class ImageSource(Section):
    """One place that images come from."""

    path: str = Field(min_length=1)
    """A folder, a parquet or arrow file, or a hub id. Looked for on this machine first."""
    subset: str | None = None
    """Configuration of a hub data set or folder."""
    split: str | None = None
    """Split of a hub data set or folder, `train` when not set; slices such as `train[:10%]` work too."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    limit: int | None = Field(default=None, gt=0)
    """Read only the first so many images."""

    @property
    def may_be_on_hub(self) -> bool:
        """Whether this is no path of this machine and could name something on the hub."""
        path = Path(self.path).expanduser()
        return not path.exists() and not self.path.startswith((".", "/", "~")) and bool(HUB_ID.fullmatch(self.path))


@dataclass(frozen=True)
class Table:
    """The images of a split, not decoded yet, and their classes.

    Attributes:
        images: a data set with a column `image`; or tensors in [0, 1], [n, channels, height, width].
        labels: the class of each, or IGNORE_INDEX.
        classes: their names.
        channels: 1 where the first image is grey, else 3.
        fingerprint: a hash of what they are.
    """

    images: Any
    labels: np.ndarray
    classes: list[str]
    channels: int
    fingerprint: str


def opened_images(source: ImageSource, columns: Columns) -> Table:
    """Find a source of images. Raises ValueError when it is not there, is empty, or has no images or labels."""
    found = _opened(source)
    if source.limit is not None:
        found = found.select(range(min(source.limit, len(found))))
    if not len(found):
        raise ValueError(f"{source.path}: no images in split {source.split or 'train'!r}")
    image = _image_column(found, columns.get("image"), source.path)
    label = _label_column(found, columns.get("label"), source.path)
    labels, names = _classes(found, label, source.path)
    pictures = found.select_columns([image])
    if image != "image":
        pictures = pictures.rename_column(image, "image")
    if not isinstance(pictures.features["image"], datasets.Image):
        try:
            pictures = pictures.cast_column("image", datasets.Image())
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{source.path}: column {image!r} holds no images ({error})") from error
    grey = _first(pictures, source.path).mode in ("1", "L")
    return Table(pictures, labels, names, 1 if grey else 3, found._fingerprint)


def _opened(source: ImageSource) -> datasets.Dataset:
    path, asked = Path(source.path).expanduser(), Source(**source.model_dump(exclude={"limit"}))
    if path.is_dir():
        return _load_folder(asked, path)
    if path.is_file() and path.suffix in (".parquet", ".arrow"):
        kind = path.suffix.removeprefix(".")
        return datasets.load_dataset(kind, data_files=str(path), split=source.split or "train")
    if path.is_file():
        raise ValueError(f"{source.path}: images come from a folder, a parquet or an arrow file, or a hub id")
    if source.may_be_on_hub:
        return _load(asked, source.path, revision=source.revision)
    raise ValueError(f"{source.path}: no such file or folder{_near(path)}")


def _image_column(found: datasets.Dataset, given: str | None, path: str) -> str:
    holding = [name for name, kind in found.features.items() if isinstance(kind, datasets.Image)]
    names = [given] if given else (holding or ["image"])
    if len(names) > 1 or names[0] not in found.features:
        trouble = f"several columns of images, {', '.join(names)}" if len(names) > 1 else f"no column {names[0]!r}"
        has = ", ".join(found.column_names)
        raise ValueError(f"{path}: {trouble}; it has {has}: say which one in data.columns.image")
    return names[0]


def _label_column(found: datasets.Dataset, given: str | None, path: str) -> str:
    names = [given] if given else [name for name in ("label", "labels") if name in found.features]
    if not names or names[0] not in found.features:
        trouble = f"no column {given!r}" if given else "no column of labels"
        has = ", ".join(found.column_names)
        raise ValueError(f"{path}: {trouble}; it has {has}: say which one in data.columns.label")
    return names[0]


def _classes(found: datasets.Dataset, column: str, path: str) -> tuple[np.ndarray, list[str]]:
    """Return the class of each row, IGNORE_INDEX where there is none, and the names of the classes."""
    kind, values = found.features[column], found.select_columns([column])[:][column]
    known = [value for value in values if value is not None]
    if isinstance(kind, datasets.ClassLabel):
        names = list(kind.names)
    elif known and all(isinstance(value, str) for value in known):
        names = sorted(set(known))
        values = [None if value is None else names.index(value) for value in values]
    elif known and all(isinstance(value, int) for value in known):
        names = [str(number) for number in range(max(known) + 1)]
    else:
        raise ValueError(f"{path}: column {column!r} holds no classes (whole numbers or names)")
    labels = np.array([IGNORE_INDEX if value is None or value < 0 else value for value in values], dtype=np.int64)
    return labels, names


def _first(pictures: datasets.Dataset, path: str) -> Any:
    try:
        return pictures[0]["image"]
    except Exception as error:  # PIL and its formats raise what they like
        raise ValueError(f"{path}: the first image cannot be opened: {error}") from error


def decoded(
    table: Table, labels: np.ndarray, channels: int, size: int | None, mean: Sequence[float], std: Sequence[float]
) -> datasets.Dataset:
    """Return rows with `pixel_values`, `labels` and `index`, whose images are opened when they are asked for."""
    first = table.images[0]["image"]
    read = _ToPixels(channels, size, first.size, tuple(mean), tuple(std))
    rows = table.images.add_column("labels", labels).add_column("index", np.arange(len(labels)))
    return rows.with_transform(read)


@dataclass(frozen=True)
class _ToPixels:
    channels: int
    size: int | None
    first: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        numbers = rows.get("index", [None] * len(rows["image"]))
        pixels = [self.pixels(image, number) for image, number in zip(rows["image"], numbers, strict=True)]
        return {"pixel_values": pixels, **{name: rows[name] for name in rows if name != "image"}}

    def pixels(self, image: Any, number: int | None) -> Float[Tensor, "channels height width"]:
        from PIL import Image, ImageOps

        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        elif image.size != self.first:
            (width, height), (other, another) = image.size, self.first
            raise ValueError(f"image {number} is {width}x{height}, the first is {other}x{another}: set data.size")
        values = torch.from_numpy(np.array(image, dtype=np.float32)).view(*image.size[::-1], self.channels) / 255
        scaled = (values - torch.tensor(self.mean)) / torch.tensor(self.std)
        return scaled.permute(2, 0, 1).contiguous()


def normalisation_of(path: str) -> tuple[list[float], list[float]]:
    """Return mean and std of a model's image processor. Raises ValueError where there is none."""
    from transformers.image_processing_base import ImageProcessingMixin

    local = Path(path).expanduser()
    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(str(local) if local.is_dir() else path)
        return list(said["image_mean"]), list(said["image_std"])
    except (OSError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"data.processor: {path} says no image_mean and image_std ({reason})") from error
