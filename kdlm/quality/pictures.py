"""Pictures of samples as uint8 arrays, [height, width, 3]: grids of images, rows side by side, points in the plane."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kdlm.disk import write_bytes
from kdlm.quality.sets import as_rows

Picture = UInt8[np.ndarray, "down across 3"]

GAP = 2  # pixels between images
PAPER = 255
LEAST_SIDE = 40  # pixels of an image on the paper: smaller ones are enlarged
LETTER = 14  # pixels of a title's height
INK = np.array([214, 69, 48])
SHADE = np.array([120, 130, 140])


def grid(
    images: Float[Tensor, "n channels height width"],
    columns: int = 8,
    scale: int | None = None,
    titles: Sequence[str] = (),
) -> Picture:
    """Return images laid out in rows of `columns`, from left to right; what is missing in the last row stays white.

    Values are read in [-1, 1], -1 black, and clipped to it; one channel is grey, three are red, green and blue. Each
    pixel becomes `scale` x `scale` of the same colour; None enlarges small images to 40 pixels or more. `titles` are
    written to the left of the rows, one a row; they need Pillow.

    Raises ValueError for another shape, values that are not finite, or a number of titles that is not that of the rows.
    """
    tiles = _tiles(images, scale)
    if columns < 1:
        raise ValueError(f"columns must be 1 or more, got {columns}")
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    if titles and len(titles) != rows:
        raise ValueError(f"{count} images in {columns} columns are {rows} rows, got {len(titles)} titles")
    columns = min(columns, count)
    left = _title_width(titles)
    paper = _paper(rows * (height + GAP) + GAP, left + columns * (width + GAP) + GAP)
    for position, tile in enumerate(tiles):
        top = GAP + position // columns * (height + GAP)
        start = left + GAP + position % columns * (width + GAP)
        paper[top : top + height, start : start + width] = tile
    return _written(paper, titles, [GAP + row * (height + GAP) + height // 2 for row in range(rows)])


def side_by_side(
    images: Mapping[str, Float[Tensor, "n _ height width"]], columns: int = 12, scale: int | None = None
) -> Picture:
    """Return one titled row for each set, under one another: what teacher and student make of the same noise.

    Sample i of every set stands in one column. More than `columns` of them go on in a further band of rows. Pixels as
    in `grid`; needs Pillow.

    Raises ValueError for no set, for sets of unequal numbers or sizes, and as `grid` does.
    """
    shapes = {name: list(batch.shape) for name, batch in images.items()}
    alike = len({(shape[0], *shape[2:]) for shape in shapes.values()}) == 1
    if not alike or any(len(shape) != 4 for shape in shapes.values()):
        raise ValueError(f"side by side stand sets of as many images of one size, got {shapes}")
    count = min(shape[0] for shape in shapes.values())
    bands = []
    for start in range(0, count, columns):
        rows = [batch[start : start + columns] for batch in images.values()]
        most = max(batch.shape[1] for batch in rows)
        together = torch.cat([batch.expand(-1, most, -1, -1).float().cpu() for batch in rows])
        bands.append(grid(together, len(rows[0]), scale, titles=list(images)))
    width = max(band.shape[1] for band in bands)
    beside = [((0, 0), (0, width - band.shape[1]), (0, 0)) for band in bands]
    return np.concatenate([np.pad(band, room, constant_values=PAPER) for band, room in zip(bands, beside, strict=True)])


def scatter(points: Float[Tensor, "n 2"], reference: Float[Tensor, "m 2"] | None = None, *, side: int = 400) -> Picture:
    """Return points of the plane as red dots on a square of `side` pixels, the reference grey below them.

    The square holds the reference with a fifth of its extent around it (of the points when there is no reference), so
    pictures of one reference can be laid over one another; what lies outside is drawn on the edge. Up is positive.
    Dots darken where they overlap.

    Raises ValueError for points that are not [n, 2] or not finite.
    """
    sets = [(points, INK)] if reference is None else [(reference, SHADE), (points, INK)]
    for given, _ in sets:
        if given.ndim != 2 or given.shape[1] != 2:
            raise ValueError(f"points of the plane are [n, 2], got {list(given.shape)}")
    rows = [as_rows(given, "points", least=1).cpu().numpy() for given, _ in sets]
    low, high = rows[0].min(0), rows[0].max(0)
    reach = 0.6 * max(float((high - low).max()), 1e-6)
    paper = np.full((side, side, 3), float(PAPER))
    for places, (_, colour) in zip(rows, sets, strict=True):
        place = ((places - (low + high) / 2) / reach + 1) / 2 * side
        across, up = np.clip(place, 1, side - 2).astype(int).T
        cover = np.zeros((side, side))
        for right in (-1, 0, 1):
            for down in (-1, 0, 1):
                np.add.at(cover, (side - 1 - up + down, across + right), 1.0)
        opaque = (1 - 0.5**cover)[..., None]
        paper = paper * (1 - opaque) + colour * opaque
    return paper.round().astype(np.uint8)


def write_png(path: str | Path, picture: Picture) -> None:
    """Write a picture as a PNG file, whole or not at all. Raises ValueError without Pillow or for another array."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [height, width, 3], got {picture.dtype} {list(picture.shape)}")
    content = BytesIO()
    _pillow("Image").fromarray(picture).save(content, format="PNG")
    write_bytes(Path(path), content.getvalue())


def write_image_folder(
    folder: str | Path, images: Float[Tensor, "n channels height width"], labels: Int[Tensor, "n"]
) -> None:
    """Write each image as a PNG file in a folder named for its class, as `datasets` and torchvision read them.

    Values are read in [-1, 1] and clipped to it; a pixel keeps 8 bits. Classes are numbered with leading zeros, so that
    their order by name is theirs by number. Raises ValueError without Pillow, and as `grid` does.
    """
    tiles, digits = _tiles(images, 1), len(str(int(labels.max())))
    for number, (tile, label) in enumerate(zip(tiles, labels.tolist(), strict=True)):
        content, grey = BytesIO(), images.shape[1] == 1
        _pillow("Image").fromarray(tile[..., 0] if grey else tile).save(content, format="PNG")
        write_bytes(Path(folder) / f"{label:0{digits}}" / f"{number:05}.png", content.getvalue())


def _tiles(images: Tensor, scale: int | None) -> UInt8[np.ndarray, "n down across 3"]:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are [n, 1 or 3, height, width], got {list(images.shape)}")
    as_rows(images, "images", least=1)
    if scale is None:
        scale = -(-LEAST_SIDE // min(images.shape[2:])) if min(images.shape[2:]) < LEAST_SIDE else 1
    if scale < 1:
        raise ValueError(f"scale must be 1 or more, got {scale}")
    values = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    tiles = values.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return tiles.repeat(scale, axis=1).repeat(scale, axis=2)


def _paper(height: int, width: int) -> Picture:
    return np.full((height, width, 3), PAPER, dtype=np.uint8)


def _title_width(titles: Sequence[str]) -> int:
    """Pixels of the longest title and the room around it."""
    return max((int(_font().getlength(title)) + 3 * GAP for title in titles), default=0)


def _written(paper: Picture, titles: Sequence[str], middles: Sequence[int]) -> Picture:
    """The paper with a title at each height."""
    if not titles:
        return paper
    sheet = _pillow("Image").fromarray(paper)
    pen = _pillow("ImageDraw").Draw(sheet)
    for title, middle in zip(titles, middles, strict=True):
        pen.text((GAP, middle - LETTER // 2), title, fill=(0, 0, 0), font=_font())
    return np.array(sheet)


def _font() -> Any:
    return _pillow("ImageFont").load_default(LETTER)


def _pillow(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"PIL.{module}")
    except ImportError as error:
        raise ValueError("pictures are written with Pillow, which is not installed: pip install pillow") from error
