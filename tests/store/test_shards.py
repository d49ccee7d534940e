"""Shards: whole ones are read, damaged ones are named, unfinished ones are not seen."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kdlm.store import About, HiddenFormat, ShardWriter, Store, TopKFormat, asked, of_batch, plan, write_about
from kdlm.store.formats import Format
from kdlm.store.units import sequences_of

VOCAB = 60


def rows(count: int, seed: int = 0) -> list[dict]:
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = generator.integers(0, VOCAB, generator.integers(3, 12))
        made.append({"input_ids": ids, "labels": np.where(generator.random(len(ids)) < 0.7, ids, -100)})
    return made


def filled(folder: Path, format: Format, data: list[dict], shards: int = 2) -> Store:
    """Capture random distributions, so that each position has one of its own."""
    write_about(folder, About(format.model_dump(mode="json"), "t", "w", "tok", VOCAB, VOCAB, 8))
    for number in range(shards):
        writer = ShardWriter()
        for row in data[number::shards]:
            (sequence,) = sequences_of(row)
            if not len(sequence.positions):
                continue
            generator = torch.Generator().manual_seed(int(row["input_ids"].sum()))
            at = torch.from_numpy(sequence.positions).long()
            logs = torch.randn(20, VOCAB, generator=generator)[at].log_softmax(-1)
            top = logs.topk(getattr(format, "k", 8))
            order = top.indices.argsort(-1)
            record = {
                "ids": top.indices.gather(-1, order),
                "log_probs": top.values.gather(-1, order),
                "log_tail": torch.log(-torch.expm1(top.values.logsumexp(-1))),
                "lse": at.float(),
                "drawn_ids": torch.zeros(len(at), 1, dtype=torch.long),
                "drawn_log_probs": torch.zeros(len(at), 1),
                "drawn_counts": torch.zeros(len(at), 1),
            }
            if isinstance(format, HiddenFormat):
                record = {"hidden": logs[:, :8]}
            writer.add(sequence, format.pack(record))
        writer.seal(folder, f"unit{number}")
    return Store(folder)


@pytest.fixture(params=[TopKFormat(k=5), HiddenFormat(dtype="float32")], ids=["top_k", "hidden"])
def format(request: pytest.FixtureRequest) -> Format:
    return request.param


def test_any_sequence_is_found_in_any_order(tmp_path: Path, format: Format) -> None:
    data = rows(25)
    store = filled(tmp_path, format, data)
    wanted = [sequence for row in data for sequence in sequences_of(row)]
    whole = store.read(wanted)
    order = np.random.default_rng(1).permutation(len(data))
    shuffled = store.read([wanted[i] for i in order])
    ends = np.cumsum([0, *(len(sequence.positions) for sequence in wanted)])
    places = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in order])
    for name, values in whole.items():
        assert torch.equal(values[torch.from_numpy(places)], shuffled[name])


def test_a_part_of_the_positions_is_that_part_of_the_record(tmp_path: Path, format: Format) -> None:
    data = rows(9)
    store = filled(tmp_path, format, data)
    one = next(s for row in data for s in sequences_of(row) if len(s.positions) > 3)
    whole = store.read([one])
    part = store.read([one._replace(positions=one.positions[1:3])])
    assert all(torch.equal(values[1:3], part[name]) for name, values in whole.items())


def test_positions_and_tokens_that_were_not_captured_are_refused(tmp_path: Path, format: Format) -> None:
    data = rows(9)
    store = filled(tmp_path, format, data)
    ids = np.arange(7)
    stranger = asked(ids, ids)
    with pytest.raises(ValueError, match="no sequence with these 7 tokens was captured"):
        store.read([stranger])
    row = next(row for row in data if (row["labels"][1:] == -100).any() and (row["labels"][1:] != -100).any())
    more = asked(row["input_ids"], row["input_ids"])
    with pytest.raises(ValueError, match=r"positions of a sequence of \d+ tokens were not captured"):
        store.read([more])
    known = sequences_of(row)[0]
    assert list(store.lacks([known, stranger, more])) == [
        (1, "no sequence with these tokens"),
        (2, "some of its positions were not captured"),
    ]


def test_nothing_asked_is_an_empty_record(tmp_path: Path, format: Format) -> None:
    store = filled(tmp_path, format, rows(4))
    assert {len(values) for values in store.read([]).values()} == {0}


@pytest.mark.parametrize("file", ["unit0.safetensors", "unit0.index.safetensors"])
def test_a_flipped_bit_anywhere_gives_an_error_that_names_the_shard(tmp_path: Path, format: Format, file: str) -> None:
    data = rows(6)
    filled(tmp_path, format, data, shards=1)
    path = tmp_path / file
    good = path.read_bytes()
    for place in {*range(0, len(good), max(1, len(good) // 60)), len(good) - 1}:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="unit0"):
            Store(tmp_path).read([s for row in data for s in sequences_of(row)])
    path.write_bytes(good)
    Store(tmp_path).read([s for row in data for s in sequences_of(row)])


def test_a_missing_or_shortened_data_file_is_named(tmp_path: Path, format: Format) -> None:
    data = rows(6)
    filled(tmp_path, format, data, shards=1)
    path = tmp_path / "unit0.safetensors"
    good = path.read_bytes()
    wanted = [s for row in data for s in sequences_of(row)]
    path.write_bytes(good[:-5])
    with pytest.raises(ValueError, match=r"unit0.safetensors: this shard is damaged .*run `kdlm capture` again"):
        Store(tmp_path).read(wanted)
    path.unlink()
    with pytest.raises(ValueError, match=r"unit0.safetensors: this shard is missing"):
        Store(tmp_path).read(wanted)


def test_a_data_file_without_its_index_is_not_seen(tmp_path: Path, format: Format) -> None:
    data = rows(8)
    filled(tmp_path, format, data)
    (tmp_path / "unit1.index.safetensors").unlink()
    store = Store(tmp_path)
    assert len(store.shards) == 1
    assert {why for _, why in store.lacks([s for row in data for s in sequences_of(row)])} == {
        "no sequence with these tokens"
    }


def test_a_folder_without_a_capture_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no capture here; make it with `kdlm capture`"):
        Store(tmp_path / "nowhere")


def test_a_batch_asks_for_the_sequences_of_its_rows(tmp_path: Path) -> None:
    from kdlm.data import Collator

    data = rows(5)
    want = [s for row in data for s in sequences_of(row)]
    for layout in ("padded", "padding_free"):
        found = of_batch(Collator(0, layout)(data))
        assert [s.key for s in found] == [s.key for s in want]
        assert all(np.array_equal(a.positions, b.positions) for a, b in zip(found, want, strict=True))


def test_units_hold_every_sequence_once_and_do_not_depend_on_repeats(tmp_path: Path) -> None:
    data = [row for row in rows(30) if (row["labels"][1:] != -100).any()]
    units = plan([data], 20)
    assert sum(len(unit.sequences) for unit in units) == len({row["input_ids"].tobytes() for row in data})
    assert len(units) > 3 and len({unit.name for unit in units}) == len(units)
    again = plan([data, data[:7]], 20)
    keys = {sequence.key for unit in again for _, sequence in unit.read([data, data[:7]])}
    assert keys == {sequence.key for unit in units for _, sequence in unit.read([data])}


def test_a_sequence_with_two_masks_is_captured_where_either_keeps(tmp_path: Path) -> None:
    ids = np.arange(6)
    one = {"input_ids": ids, "labels": np.where(ids < 3, ids, -100)}
    other = {"input_ids": ids, "labels": np.where(ids == 5, ids, -100)}
    (unit,) = plan([[one, other]], 100)
    ((_, sequence),) = unit.read([[one, other]])
    assert sequence.positions.tolist() == [0, 1, 4]
