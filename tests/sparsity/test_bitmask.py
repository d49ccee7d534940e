"""Sparse weights as bits and values: smaller, and back bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdlm.cli import main
from kdlm.sparsity.bitmask import compress, compress_folder, expand, expand_folder
from kdlm.sparsity.layers import described_sparsity
from kdlm.sparsity.section import SparsitySection


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, dtype in (("half", torch.bfloat16), ("whole", torch.float32)):
        weight = torch.randn(13, 11, generator=generator)
        made[name] = weight.masked_fill(torch.rand(13, 11, generator=generator) < 0.5, 0.0).to(dtype)
    return {**made, "dense": torch.randn(5, 3, generator=generator), "vector": torch.zeros(9), "scalar": torch.ones(())}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == value.dtype and torch.equal(ours[name].view(torch.int8 if value.ndim else value.dtype),
                                                        value.view(torch.int8 if value.ndim else value.dtype))
        for name, value in theirs.items()
    )  # fmt: skip


def test_what_is_compressed_comes_back_bit_for_bit_zeros_with_a_sign_too() -> None:
    given = tensors()
    given["whole"][0, :3] = torch.tensor([-0.0, float("nan"), float("inf")])
    kept, metadata = compress(given)
    assert same(expand(kept, metadata), given)
    assert {"half.bits", "whole.values", "dense", "vector.bits"} <= kept.keys() and "dense.bits" not in kept


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_the_bytes_are_a_bit_for_each_weight_and_what_is_left(share: float) -> None:
    weight = torch.randn(64, 128)
    weight.view(-1)[: int(share * weight.numel())] = 0.0
    kept, _ = compress({"w": weight.bfloat16()})
    assert sum(value.numel() * value.element_size() for value in kept.values()) == 64 * 128 * (1 / 8 + 2 * (1 - share))


def test_a_folder_of_several_files_comes_back_with_all_that_is_beside(tmp_path: Path) -> None:
    source = tmp_path / "plain"
    source.mkdir()
    save_file(tensors(), source / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({"other": torch.zeros(7, 8)}, source / "model-00002-of-00002.safetensors", {"format": "pt"})
    (source / "config.json").write_text("{}")
    for name in ("small", "again"):
        (tmp_path / name).mkdir()
    compress_folder(source, tmp_path / "small")
    expand_folder(tmp_path / "small", tmp_path / "again")
    assert sorted(p.name for p in source.iterdir()) == sorted(p.name for p in (tmp_path / "again").iterdir())
    for file in source.glob("*.safetensors"):
        assert same(load_file(tmp_path / "again" / file.name), load_file(file))
    with pytest.raises(ValueError, match="nothing to expand"):
        expand_folder(source, tmp_path / "again")


def test_a_damaged_pair_is_refused() -> None:
    kept, metadata = compress({"w": torch.eye(8)})
    kept["w.values"] = kept["w.values"][:-1]
    with pytest.raises(ValueError, match="w: 7 values for 8 places"):
        expand(kept, metadata)


def test_the_verb_prunes_compresses_and_expands(tmp_path: Path, capsys) -> None:
    from transformers import AutoModelForCausalLM

    words = ["sparsify", "sandbox:code-teacher-tiny", "--pattern", "2:4"]
    assert main([*words, "-o", str(tmp_path / "plain")]) == 0
    assert "50.0% of 81,920 weights in 14 linear layers are zero (2:4)" in capsys.readouterr().out
    assert main([*words, "--compress", "-o", str(tmp_path / "small")]) == 0
    assert main(["sparsify", str(tmp_path / "small"), "--expand", "-o", str(tmp_path / "again")]) == 0
    plain, again = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    assert same(again, plain)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert described_sparsity(model, SparsitySection(pattern="2:4"))["share"] == 0.5
    small, large = (sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("small", "plain"))
    assert small < 0.75 * large  # embeddings stay whole
    assert main(["sparsify", "sandbox:code-teacher-tiny", "-o", str(tmp_path / "none")]) == 2
    assert main(["sparsify", "x", "--expand", "--compress", "-o", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
