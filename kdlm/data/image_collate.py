"""Collation of rows with images: the model's processor makes the batch, and the labels follow its image tokens."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kdlm.data.chat import Span
from kdlm.data.encoding import trained_tokens
from kdlm.signal import IGNORE_INDEX


@dataclass(frozen=True)
class ImageTextCollator:
    """Makes a batch of rendered rows with the model's processor, padded on the right.

    `input_ids`, `attention_mask` and `labels` are those of `Collator`; image tokens have no label. `visual`, of their
    shape, is the number of the image in the batch that an image token belongs to, and -1 elsewhere. The rest is the
    processor's own (`pixel_values`, `pixel_attention_mask`, `image_grid_thw` ...). Raises ValueError for a row whose
    images do not fit into `max_length`, and for a processor that does not say where it puts images.

    With the processor of a teacher, `theirs` is the teacher's batch of the same rows, uncut, and in it `at` says where
    each of the student's tokens is (see `matched`).
    """

    processor: Any
    max_length: int
    teacher: Any = None
    """The teacher's processor, where it makes other tokens of an image than the student's."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch, of_image = self._read(rows)
        if self.teacher is not None:
            theirs, of_their_image = ImageTextCollator(self.teacher, self.max_length)._read(rows)
            batch["theirs"] = theirs | {"at": matched(batch, of_image, theirs, of_their_image)}
        self._cut(batch, rows)
        if "weight" in rows[0]:
            batch["weight"] = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in ("index", "domain")}

    def _read(self, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Bool[Tensor, "batch length"]]:
        """Return the whole rows as a batch, and which tokens the processor has put in the place of images."""
        batch = dict(
            self.processor(
                images=[[opened(one) for one in row["images"]] for row in rows],
                text=[row["text"] for row in rows],
                padding=True,
                padding_side="right",
                add_special_tokens=False,
                return_tensors="pt",
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
            )
        )
        if "text_replacement_offsets" not in batch:
            raise ValueError(
                f"{type(self.processor).__name__} does not say where it puts images "
                "(text_replacement_offsets): this release of transformers cannot label its text"
            )
        offsets, placed = batch.pop("offset_mapping"), batch.pop("text_replacement_offsets")
        ids = batch["input_ids"]
        trained, of_image = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        visual = torch.full_like(ids, -1)
        seen = 0
        for number, (row, images) in enumerate(zip(rows, placed, strict=True)):
            spans = expanded(list(zip(row["spans"][::2], row["spans"][1::2], strict=True)), images)
            trained[number] = torch.from_numpy(trained_tokens(offsets[number].tolist(), spans))
            for image in images:
                begin, end = image["new_span"]
                begins, ends = offsets[number].unbind(-1)
                inside = (begins >= begin) & (ends <= end) & (ends > begins)
                of_image[number] |= inside
                visual[number, inside & (ids[number] == self._image_id)] = seen
                seen += 1
        batch |= {"labels": torch.where(trained & ~of_image, ids, IGNORE_INDEX), "visual": visual}
        batch["labels"][:, 0] = IGNORE_INDEX
        return batch, of_image

    @property
    def _image_id(self) -> int:
        return self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)

    def _cut(self, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        """Cut what belongs to tokens at `max_length`."""
        lost = (batch["visual"][:, self.max_length :] >= 0).any(-1)
        if lost.any():
            row = rows[int(lost.nonzero()[0])]
            raise ValueError(f"{row['place']}: its images reach beyond {self.max_length} tokens: raise data.max_length")
        shape = batch["input_ids"].shape
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.shape == shape:
                batch[name] = value[:, : self.max_length]
        if "theirs" in batch:
            batch["theirs"]["at"] = batch["theirs"]["at"][:, : self.max_length]


def matched(
    ours: dict[str, Tensor],
    of_our_image: Bool[Tensor, "batch length"],
    theirs: dict[str, Tensor],
    of_their_image: Bool[Tensor, "batch other"],
) -> Int[Tensor, "batch length"]:
    """Return where each token of one reading is in another reading of the same rows: `b * other + t`, or -1.

    Tokens of text follow one another in the same order; those of an image do where both have equally many of it.
    Raises ValueError where the texts differ.
    """
    at = torch.full_like(ours["input_ids"], -1)
    place = torch.arange(theirs["input_ids"].numel()).view_as(theirs["input_ids"])
    text, other = (b["attention_mask"].bool() & ~m for b, m in ((ours, of_our_image), (theirs, of_their_image)))
    if not torch.equal(ours["input_ids"][text], theirs["input_ids"][other]):
        raise ValueError("the processors of student and teacher make different tokens of the same text")
    at[text] = place[other]
    for image in range(int(ours["visual"].amax()) + 1):
        here, there = ours["visual"] == image, theirs["visual"] == image
        if here.sum() == there.sum():
            at[here] = place[there]
    return at


def expanded(spans: list[Span], images: list[dict[str, Any]]) -> list[Span]:
    """Return where spans of a text are once the processor has put image tokens in the place of each image."""
    ends = np.array([image["span"][1] for image in images], dtype=np.int64)
    gained = np.array([0, *(image["new_span"][1] - image["span"][1] for image in images)])

    def moved(place: int) -> int:
        return place + int(gained[np.searchsorted(ends, place, side="right")])

    return [(moved(start), moved(end)) for start, end in spans]


def opened(reference: dict[str, Any]) -> Any:
    """Return the image, in RGB. Raises ValueError where it is no image, ImportError without the library for them."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("images are read with pillow: pip install pillow") from error

    source = io.BytesIO(reference["bytes"]) if reference["bytes"] else reference["path"]
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{reference['path'] or 'an image'}: cannot be read: {error}") from error
