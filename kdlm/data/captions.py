"""Images and texts that belong together."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from kdlm.data.cache import fingerprint
from kdlm.data.collate import stacked
from kdlm.data.images import TensorRows
from kdlm.data.load import Data
from kdlm.data.report import DataReport
from kdlm.section import Section


class CaptionsSection(Section):
    """The sandbox's digits with captions: `pixel_values` in [-1, 1], `input_ids`, `attention_mask`, `labels`, `index`.

    Every image comes with each of the three captions of its digit; evaluation has one of them, by turns.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"pairs", "images"})
    """What a method may need of it."""

    name: Literal["captions"] = "captions"
    images: int | None = Field(None, ge=1)
    """Training images, the first of a fixed order; by default all 1,437."""

    def load(self, seed: int) -> Data:
        """Return the splits."""
        from kdlm.sandbox.captions import TEMPLATES, caption_ids
        from kdlm.sandbox.digits import digits

        train, test = digits()
        order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))[: self.images]
        count = len(TEMPLATES)
        splits = {
            "train": (train.images[order], train.labels[order], torch.arange(count)),
            "eval": (test.images, test.labels, None),
        }
        rows = {}
        for name, (images, labels, templates) in splits.items():
            each = 1 if templates is None else count
            numbers = torch.arange(len(labels)) % count if templates is None else templates.repeat(len(labels))
            labels = labels.repeat_interleave(each)
            ids = caption_ids()[labels, numbers]
            rows[name] = TensorRows(
                {
                    "pixel_values": images.repeat_interleave(each, 0) * 2 - 1,
                    "input_ids": ids,
                    "attention_mask": (ids != 0).long(),
                    "labels": labels,
                    "index": torch.arange(len(labels)),
                }
            )
        names = {name: fingerprint("captions", name, self.images) for name in rows}
        notes = [f"{name}: {len(split)} pairs" for name, split in rows.items()]
        return Data(rows["train"], rows["eval"], stacked, DataReport([], notes=notes), names, {})

    def look(self) -> list[str]:
        """Return a line about the pairs."""
        return ["data: captions of the digits"]
