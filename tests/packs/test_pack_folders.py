"""Laws of packs: what they weigh, what they lose, what they refuse, and what a failure leaves behind."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from packed_models import a_pair, changed, distance, left_in, noise, saved, size_of, small_model, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdlm.packs import Pack, Router, merge, pack
from kdlm.packs.compression import LowRank
from kdlm.packs.model_folder import INDEX, ModelFolder


def restored(base: Path, tuned: Path, root: Path, **options) -> Path:
    pack(base, tuned, root / "pack", **options)
    merge(base, [root / "pack"], root / "merged")
    return root / "merged"


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_full_rank_gives_the_tuned_weights_back(tmp_path, family, tied):
    base, tuned = a_pair(tmp_path, family=family, tied=tied, shards="12KB")
    assert distance(restored(base, tuned, tmp_path, rank="full"), tuned) <= 1e-5
    assert Pack(tmp_path / "pack").about.relative_error == 0


def test_a_bfloat16_model_comes_back_bit_for_bit(tmp_path):
    base, tuned = a_pair(tmp_path, dtype=torch.bfloat16)
    merged = restored(base, tuned, tmp_path, rank="full")
    assert distance(merged, tuned) == 0
    assert {weight.dtype for weight in weights(merged).values()} == {torch.bfloat16}


def test_a_tuned_model_of_another_type_is_brought_to_the_types_of_the_base(tmp_path):
    base = saved(small_model(dtype=torch.bfloat16), tmp_path / "base")
    model = changed(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    tuned, rounded = saved(model, tmp_path / "tuned"), saved(model.to(torch.bfloat16), tmp_path / "rounded")
    assert distance(restored(base, tuned, tmp_path, rank="full"), rounded) == 0


@pytest.mark.parametrize("share", [0.5, 0.3, 0.2])
def test_a_pack_keeps_within_its_share_all_files_counted_and_its_error_is_the_one_it_reports(tmp_path, share):
    base, tuned = a_pair(tmp_path)
    merged, was, now = weights(restored(base, tuned, tmp_path, share=share)), weights(base), weights(tuned)
    about = Pack(tmp_path / "pack").about
    assert about.delta_bytes == sum(weight.nbytes for weight in was.values())
    assert size_of(tmp_path / "pack") <= share * about.delta_bytes
    assert size_of(tmp_path / "pack") >= 0.9 * share * about.delta_bytes
    lost = sum((merged[name].double() - now[name].double()).square().sum() for name in was)
    energy = sum((was[name].double() - now[name].double()).square().sum() for name in was)
    assert about.relative_error == pytest.approx((lost / energy).sqrt().item(), rel=1e-3)


def test_more_bytes_lose_less(tmp_path):
    base, tuned = a_pair(tmp_path)
    errors = []
    for share in (0.2, 0.3, 0.5, 1.0):
        pack(base, tuned, tmp_path / str(share), share=share)
        errors.append(Pack(tmp_path / str(share)).about.relative_error)
    assert errors == sorted(errors, reverse=True)


def test_a_higher_rank_loses_less_and_reports_the_singular_values_it_cut_off(tmp_path):
    base, tuned = a_pair(tmp_path)
    was, now, errors = weights(base), weights(tuned), []
    for rank in (1, 3, 6):
        pack(base, tuned, tmp_path / str(rank), rank=rank)
        about = Pack(tmp_path / str(rank)).about
        errors.append(about.relative_error)
        cut = {name: kept for name, kept in about.deltas.items() if isinstance(kept.how, LowRank)}
        assert cut
        for name, kept in cut.items():
            values = torch.linalg.svdvals((now[name] - was[name]).double())
            expected = (values[rank:].norm() / values.norm()).item()
            assert kept.relative_error == pytest.approx(expected, rel=1e-3)
    assert errors == sorted(errors, reverse=True)


def test_packing_again_what_a_pack_made_loses_nothing(tmp_path):
    base, tuned = a_pair(tmp_path)
    first = restored(base, tuned, tmp_path, rank=4)
    pack(base, first, tmp_path / "again", rank=4)
    merge(base, [tmp_path / "again"], tmp_path / "second")
    assert distance(first, tmp_path / "second") <= 1e-6
    pack(base, tuned, tmp_path / "same", rank=4)
    assert load_file(tmp_path / "same/pack.safetensors").keys() == load_file(tmp_path / "pack/pack.safetensors").keys()
    assert (tmp_path / "same/pack.json").read_bytes() == (tmp_path / "pack/pack.json").read_bytes()


def test_only_what_changed_is_stored_and_embeddings_norms_and_heads_are_among_it(tmp_path):
    def some(name, weight):
        touched = name in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight")
        return noise(name, weight) if touched else torch.zeros_like(weight)

    base, tuned = a_pair(tmp_path, some)
    assert distance(restored(base, tuned, tmp_path, rank="full"), tuned) <= 1e-5
    about = Pack(tmp_path / "pack").about
    assert set(about.deltas) == {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"}
    assert "model.layers.0.mlp.up_proj.weight" in about.unchanged


def test_rows_that_tuning_never_touched_take_no_bytes(tmp_path):
    def seen(name, weight):
        added = noise(name, weight) if "embed" in name else torch.zeros_like(weight)
        added[10:] = 0
        return added

    base, tuned = a_pair(tmp_path, seen)
    assert distance(restored(base, tuned, tmp_path, rank="full"), tuned) <= 1e-5
    kept = Pack(tmp_path / "pack").about.deltas["model.embed_tokens.weight"]
    assert kept.rows == 10
    assert kept.bytes < 10 * 24 * 4 + 90 // 8 + 2


def test_a_tied_head_that_only_one_side_stores_follows_its_embedding(tmp_path):
    base, tuned = a_pair(tmp_path, tied=True)
    once = load_file(base / "model.safetensors")
    save_file({**once, "lm_head.weight": once["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    merged = restored(base, tuned, tmp_path, rank="full")
    assert Pack(tmp_path / "pack").about.same_as == {"lm_head.weight": "model.embed_tokens.weight"}
    assert distance(merged, tuned) <= 1e-5
    stored = load_file(merged / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    pack(tuned, base, tmp_path / "back", rank="full")
    merge(tuned, [tmp_path / "back"], tmp_path / "was")
    assert distance(tmp_path / "was", base) <= 1e-5


def damaged(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Change or remove tensors of a folder; `__` stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__norm__weight": torch.zeros(25)}, ["model.norm.weight: [24] in", "[25] in", "one architecture"]),
        (
            {"model__embed_tokens__weight": torch.zeros(95, 24)},
            ["model.embed_tokens.weight", "resize_token_embeddings"],
        ),
        ({"model__norm__weight": None}, ["model.norm.weight: in", "but not in"]),
        ({"more__bias": torch.ones(3)}, ["more.bias: in", "but not in"]),
        ({"model__norm__weight": torch.full((24,), torch.nan)}, ["model.norm.weight", "not finite"]),
        ({"model__norm__weight": torch.ones(24, dtype=torch.int8)}, ["model.norm.weight", "I8", "save both"]),
    ],
)
def test_models_that_do_not_fit_are_refused_with_the_name_of_the_tensor(tmp_path, changes, words):
    base, tuned = a_pair(tmp_path)
    damaged(tuned, **changes)
    with pytest.raises(ValueError) as caught:
        pack(base, tuned, tmp_path / "pack", rank=4)
    assert all(word in str(caught.value) for word in words)
    assert left_in(tmp_path) == ["base", "tuned"]


def test_models_that_do_not_differ_are_refused(tmp_path):
    base, _ = a_pair(tmp_path)
    wide = saved(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), tmp_path / "wide")
    for same in (base, wide):
        with pytest.raises(ValueError, match="there is nothing to pack"):
            pack(base, same, tmp_path / "pack")


def test_what_is_no_model_is_refused_in_words(tmp_path):
    base, tuned = a_pair(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter.*merge_and_unload"):
        pack(base, tmp_path / "adapter", tmp_path / "pack")
    with pytest.raises(ValueError, match="no such folder"):
        pack(base, tmp_path / "none", tmp_path / "pack")
    (tuned / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read"):
        pack(base, tuned, tmp_path / "pack", rank=4)
    (tuned / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="save_pretrained"):
        pack(base, tuned, tmp_path / "pack", rank=4)
    with pytest.raises(ValueError, match="not a pack"):
        Pack(base)


def test_a_damaged_pack_is_refused(tmp_path):
    base, tuned = a_pair(tmp_path)
    pack(base, tuned, tmp_path / "pack", rank=4)
    tensors = tmp_path / "pack/pack.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="damaged"):
        Pack(tmp_path / "pack")
    about = json.loads((tmp_path / "pack/pack.json").read_text())
    (tmp_path / "pack/pack.json").write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(ValueError, match=r"pack.json: not a pack that this kdlm reads: format"):
        Pack(tmp_path / "pack")


def test_a_write_that_fails_leaves_nothing_and_one_that_was_killed_is_cleared_away(tmp_path, monkeypatch):
    base, tuned = a_pair(tmp_path)
    (tmp_path / ".pack.partial").mkdir()
    (tmp_path / ".pack.partial/pack.safetensors").write_bytes(b"half")

    def full_disk(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("kdlm.packs.tensor_files.TensorFile.write", full_disk)
        with pytest.raises(OSError, match="No space left"):
            pack(base, tuned, tmp_path / "pack", rank=4)
    assert left_in(tmp_path) == ["base", "tuned"]
    pack(base, tuned, tmp_path / "pack", rank=4)
    with monkeypatch.context() as patched:
        patched.setattr("kdlm.packs.tensor_files.TensorFile.write", full_disk)
        with pytest.raises(OSError, match="No space left"):
            merge(base, [tmp_path / "pack"], tmp_path / "merged")
    assert left_in(tmp_path) == ["base", "pack", "tuned"]
    with pytest.raises(ValueError, match="there already"):
        merge(base, [tmp_path / "pack"], tmp_path / "pack")
    assert left_in(tmp_path / "pack") == ["pack.json", "pack.safetensors"]


def test_memory_is_that_of_the_largest_tensor_and_not_of_the_model(tmp_path, monkeypatch):
    many = {f"block.{number}.weight": torch.randn(48, 32) for number in range(40)}
    for folder, scale in (("base", 1.0), ("tuned", 1.01)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        tensors = {name: tensor * scale for name, tensor in many.items()}
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    alive, most = set(), 0
    read = ModelFolder.read

    def watched(self, name):
        nonlocal most
        tensor = read(self, name).clone()
        alive.add(key := (tensor.data_ptr(), name))
        weakref.finalize(tensor, alive.discard, key)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(ModelFolder, "read", watched)
    pack(tmp_path / "base", tmp_path / "tuned", tmp_path / "pack")
    merge(tmp_path / "base", [tmp_path / "pack"], tmp_path / "merged")
    merge(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "whole")
    assert most <= 4  # of 40: one of each model at a time, and what the loop has not let go of
    assert not alive


def test_the_files_of_the_base_are_kept_and_open_without_kdlm(tmp_path):
    base, tuned = a_pair(tmp_path, shards="12KB")
    (base / "tokenizer_config.json").write_text("{}")
    (base / "training_args.bin").write_bytes(b"of another run")
    merged = restored(base, tuned, tmp_path, rank="full")
    assert left_in(merged) == [name for name in left_in(base) if name != "training_args.bin"]
    assert len([name for name in left_in(merged) if name.endswith(".safetensors")]) > 2
    assert (merged / INDEX).read_bytes() == (base / INDEX).read_bytes()
    for path in merged.glob("*.safetensors"):
        with safe_open(path, framework="pt") as ours, safe_open(base / path.name, framework="pt") as theirs:
            assert set(ours.keys()) == set(theirs.keys())
            assert ours.metadata() == theirs.metadata()


def test_a_change_of_config_or_tokenizer_is_said_because_no_pack_holds_it(tmp_path):
    base, tuned = a_pair(tmp_path)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    lines = "\n".join(pack(base, tuned, tmp_path / "pack", rank=4))
    assert "note: config.json differs in rms_norm_eps" in lines
    assert "note: chat_template.jinja differs" in lines


def test_a_router_and_a_merge_agree(tmp_path):
    base, tuned = a_pair(tmp_path)
    merged = restored(base, tuned, tmp_path, share=0.25)
    live = Router(base, {"a": tmp_path / "pack"}).use("a").state_dict()
    assert all(torch.equal(live[name], weight) for name, weight in weights(merged).items())
