"""A rank's share of evaluation rows."""

from typing import Any

from torch.utils.data import Dataset

from kdlm.data.alignment import NONE
from kdlm.signal import IGNORE_INDEX


class Share(Dataset):
    """Every `world`-th row. Of text ranks get equally many, because sharded models must run in step: a missing last row
    is replaced by one that trains on nothing. An image counts whatever its label: there some ranks have one less."""

    def __init__(self, rows: Any, rank: int, world: int):
        self.rows, self.rank, self.world = rows, rank, world
        self.text = len(rows) > 0 and "input_ids" in rows[0]

    def __len__(self) -> int:
        return -(-(len(self.rows) - (0 if self.text else self.rank)) // self.world)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = index * self.world + self.rank
        if place < len(self.rows):
            return self.rows[place]
        row = dict(self.rows[0])
        nothing = {"labels": [IGNORE_INDEX] * len(row["input_ids"])}
        if "chunks" in row:  # two readings
            size = len(row["their_ids"])
            nothing |= {"chunks": [NONE] * len(row["input_ids"]), "their_chunks": [NONE] * size}
            nothing["their_labels"] = [IGNORE_INDEX] * size
        return {**row, **nothing}
