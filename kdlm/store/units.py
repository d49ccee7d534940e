"""Units: how the sequences of a data set are cut into shards, the same way by whoever does it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from kdlm.store.sequences import Asked, asked

_OF_ALL = {name: name for name in ("input_ids", "labels", "seq_lengths")}
_OF_TEACHER = {"input_ids": "their_ids", "labels": "their_labels", "seq_lengths": "their_lengths"}


class Place(NamedTuple):
    """Where a sequence stands: tokens `start` to `stop` of a row of a split."""

    split: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """Sequences that become one shard.

    Attributes:
        name: a hash of the keys of its sequences.
        sequences: every place that each of them has in the data.
        rows: its kept positions; an upper bound where a sequence has several places.
    """

    name: str
    sequences: list[list[Place]]
    rows: int

    def read(self, splits: Sequence[Any]) -> list[tuple[np.ndarray, Asked]]:
        """Return token ids and kept positions (of any of its places) of each sequence, the longest first."""
        found = []
        for places in self.sequences:
            seen = [_read(splits, place) for place in places]
            ids, first = seen[0]
            positions = np.unique(np.concatenate([sequence.positions for _, sequence in seen]))
            found.append((ids, first._replace(positions=positions)))
        return sorted(found, key=lambda sequence: -sequence[1].length)


def plan(splits: Sequence[Any], rows_per_unit: int) -> list[Unit]:
    """Cut the sequences of all splits, each of them once, into units of about so many rows, in the order of the data.

    Splits are indexable, of rows with `input_ids`, `labels` and, where rows are packed, `seq_lengths`; in rows of two
    readings the sequences are the teacher's, `their_ids` and so on. Only hashes and places are kept in memory.
    """
    places: dict[bytes, list[Place]] = {}
    rows: dict[bytes, int] = {}
    for number, split in enumerate(splits):
        for row, content in enumerate(rows_of(split)):
            for start, stop in _spans(content):
                place = Place(number, row, start, stop)
                _, sequence = _cut(content, place)
                if len(sequence.positions):
                    places.setdefault(sequence.key, []).append(place)
                    rows[sequence.key] = rows.get(sequence.key, 0) + len(sequence.positions)
    units: list[Unit] = []
    keys: list[bytes] = []
    size = 0
    for key in places:
        keys.append(key)
        size += rows[key]
        if size >= rows_per_unit:
            units.append(_unit(keys, places, size))
            keys, size = [], 0
    return [*units, _unit(keys, places, size)] if keys else units


def rows_of(split: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a split as a teacher reads them; of a `datasets.Dataset` by the thousand, from Arrow."""
    if not hasattr(split, "with_format"):
        yield from map(_as_read, split)
        return
    for table in split.with_format("arrow").iter(batch_size=1000):
        columns = _as_read({name: table.column(name) for name in table.schema.names})
        for row in range(len(table)):
            yield {name: column[row].values.to_numpy() for name, column in columns.items()}


def _as_read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokens, labels and lengths of a row or table: of two readings of the text, the teacher's."""
    names = _OF_TEACHER if "their_ids" in content else _OF_ALL
    return {name: content[column] for name, column in names.items() if column in content}


def _unit(keys: list[bytes], places: dict[bytes, list[Place]], rows: int) -> Unit:
    return Unit(xxhash.xxh3_128_hexdigest(b"".join(keys)), [places[key] for key in keys], rows)


def _spans(content: Mapping[str, Any]) -> list[tuple[int, int]]:
    ends = np.cumsum(content["seq_lengths"] if "seq_lengths" in content else [len(content["input_ids"])]).tolist()
    return list(zip([0, *ends], ends, strict=False))


def _read(splits: Sequence[Any], place: Place) -> tuple[np.ndarray, Asked]:
    return _cut(_as_read(splits[place.split][place.row]), place)


def _cut(content: Mapping[str, Any], place: Place) -> tuple[np.ndarray, Asked]:
    ids, labels = (np.asarray(content[name])[place.start : place.stop] for name in ("input_ids", "labels"))
    return ids, asked(ids, labels)


def sequences_of(content: Mapping[str, Any]) -> list[Asked]:
    """Return the sequences of a row: one, or those that were packed into it."""
    return [_cut(content, Place(0, 0, start, stop))[1] for start, stop in _spans(content)]
