"""Laws of sums: packs and tuned models on a base, and on another base than their own."""

from pathlib import Path

import pytest
import torch
from packed_models import a_pair, changed, distance, left_in, saved, small_model, weights
from safetensors.torch import load_file, save_file

from kdlm.packs import merge, pack


@pytest.fixture
def three(tmp_path) -> tuple[Path, Path, Path]:
    """A base and two models that were tuned from it."""
    base, first = a_pair(tmp_path, shards="12KB")
    return base, first, saved(changed(small_model(), seed=2), tmp_path / "other")


def same(folder: Path, other: Path) -> bool:
    return distance(folder, other) == 0


def test_the_sum_of_two_packs_commutes(three, tmp_path):
    base, first, second = three
    packs = []
    for number, tuned in enumerate((first, second)):
        packs.append(tmp_path / f"pack-{number}")
        pack(base, tuned, packs[-1], share=0.3)
    merge(base, packs, tmp_path / "one", weights=[0.25, 0.5])
    merge(base, packs[::-1], tmp_path / "two", weights=[0.5, 0.25])
    assert same(tmp_path / "one", tmp_path / "two")
    assert not same(tmp_path / "one", base)


def test_a_weight_of_zero_is_the_base_and_of_one_the_tuned_model(three, tmp_path):
    base, first, second = three
    merge(base, [first, second], tmp_path / "none", weights=[0, 0])
    merge(base, [first, second], tmp_path / "first", weights=[1, 0])
    assert same(tmp_path / "none", base)
    assert distance(tmp_path / "first", first) <= 1e-6


def test_deltas_add_up(three, tmp_path):
    base, first, second = three
    merge(base, [first, second], tmp_path / "sum", weights=[2, -0.5])
    was, one, two, now = (weights(folder) for folder in (base, first, second, tmp_path / "sum"))
    for name, weight in now.items():
        expected = was[name] + 2 * (one[name] - was[name]) - 0.5 * (two[name] - was[name])
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)


def test_a_pack_of_the_whole_difference_and_the_tuned_model_itself_are_one(three, tmp_path):
    base, first, second = three
    pack(base, first, tmp_path / "pack", rank="full")
    merge(base, [tmp_path / "pack", second], tmp_path / "packed")
    merge(base, [first, second], tmp_path / "whole")
    assert same(tmp_path / "packed", tmp_path / "whole")


def test_tuning_moves_to_another_base(three, tmp_path):
    base, first, newer = three
    merge(newer, [first], tmp_path / "moved", minus=base)
    old, tuned, new, moved = (weights(folder) for folder in (base, first, newer, tmp_path / "moved"))
    for name, weight in moved.items():
        torch.testing.assert_close(weight, new[name] + (tuned[name] - old[name]), rtol=0, atol=1e-6)
    merge(base, [tmp_path / "moved"], tmp_path / "back", minus=newer)
    assert distance(tmp_path / "back", first) <= 1e-6


def test_a_pack_goes_on_another_base_only_when_asked_to(three, tmp_path):
    base, first, newer = three
    pack(base, first, tmp_path / "pack", rank="full")
    with pytest.raises(ValueError, match=r"pack was made for another base than .*--any-base"):
        merge(newer, [tmp_path / "pack"], tmp_path / "moved")
    merge(newer, [tmp_path / "pack"], tmp_path / "moved", any_base=True)
    merge(newer, [first], tmp_path / "whole", minus=base)
    assert same(tmp_path / "moved", tmp_path / "whole")


def test_one_changed_number_makes_another_base(three, tmp_path):
    base, first, _ = three
    pack(base, first, tmp_path / "pack", rank=4)
    shard = sorted(base.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[-1] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another base"):
        merge(base, [tmp_path / "pack"], tmp_path / "merged")


def test_another_sharding_is_the_same_base(three, tmp_path):
    base, first, _ = three
    pack(base, first, tmp_path / "pack", rank=4)
    merge(saved(small_model(), tmp_path / "single"), [tmp_path / "pack"], tmp_path / "merged")
    merge(base, [tmp_path / "pack"], tmp_path / "sharded")
    assert same(tmp_path / "merged", tmp_path / "sharded")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [1.0, 2.0, 3.0]}, "3 for 2 packs and models"),
        ({"minus": "other"}, "all that was given are packs"),
    ],
)
def test_what_cannot_be_merged_is_said_and_leaves_nothing(three, tmp_path, options, words):
    base, first, _ = three
    pack(base, first, tmp_path / "pack", rank=4)
    before = left_in(tmp_path)
    options = {key: str(tmp_path / value) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(ValueError, match=words):
        merge(base, [tmp_path / "pack", tmp_path / "pack"], tmp_path / "merged", **options)
    assert left_in(tmp_path) == before


def test_a_base_of_other_shapes_is_refused_with_the_name_of_the_tensor(three, tmp_path):
    base, first, newer = three
    pack(base, first, tmp_path / "pack", rank=4)
    tensors = load_file(newer / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(25)
    save_file(tensors, newer / "model.safetensors", metadata={"format": "pt"})
    before = left_in(tmp_path)
    with pytest.raises(ValueError, match=r"model.norm.weight: .*pack has \[24\] floats.* F32 \[25\]"):
        merge(newer, [tmp_path / "pack"], tmp_path / "moved", any_base=True)
    del tensors["model.norm.weight"]
    save_file(tensors, newer / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.norm.weight: in .*knows no such tensor"):
        merge(newer, [tmp_path / "pack"], tmp_path / "moved", any_base=True)
    assert left_in(tmp_path) == before
