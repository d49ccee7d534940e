"""Affinity mimicking of dual encoders, and the students that inherit weights."""

from pathlib import Path

import pytest
import torch
from small_images import STEP, arguments, resumed
from small_pairs import pairs, small_clip

from kdlm import DistillTrainer
from kdlm.data import CaptionsSection, TensorRows, stacked
from kdlm.losses import affinity
from kdlm.methods import Affinity, AffinitySection
from kdlm.models import DualEncoder, DualEncoderSource, InheritedStudent, inherit, view
from kdlm.models.dual_encoders import Tower


def nets(student=None, teacher=None):
    return {
        "student": DualEncoder((student or small_clip()).double()),
        "teacher": DualEncoder((teacher or small_clip(24, 3, embedding=12, seed=1)).double()),
    }


def test_clip_is_seen_as_a_dual_encoder_whose_embeddings_have_length_1():
    encoder, batch = view(small_clip().double()), pairs()
    assert isinstance(encoder, DualEncoder)
    for found in (encoder.images(batch["pixel_values"]), encoder.texts(batch["input_ids"], batch["attention_mask"])):
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(8, dtype=torch.float64))


def test_at_equal_networks_the_gradient_is_nothing():
    same = nets(small_clip(), small_clip())
    terms = Affinity().losses(same, pairs(), frozenset(), STEP).terms
    terms["affinity"].sum.backward()
    assert max(p.grad.abs().max() for p in same["student"].module.parameters() if p.grad is not None) < 1e-12
    assert all(p.grad is None for p in same["teacher"].module.parameters())


def test_the_order_of_the_pairs_is_inert():
    both, batch = nets(), pairs()
    turned = {key: value.flip(0) for key, value in batch.items()}
    sums = [Affinity(share=0.5).losses(both, rows, frozenset(), STEP).terms for rows in (batch, turned)]
    for name in ("clip", "affinity"):
        torch.testing.assert_close(sums[0][name].sum, sums[1][name].sum)


def test_the_share_weighs_the_two_losses_and_at_its_ends_leaves_one_out():
    both = nets()
    mixed = Affinity(share=0.25).losses(both, pairs(), frozenset(), STEP).terms
    assert (mixed["clip"].weight, mixed["affinity"].weight) == (0.75, 0.25)
    assert set(Affinity(share=1).losses(both, pairs(), frozenset(), STEP).terms) == {"affinity"}
    alone = AffinitySection(share=0).build([], None)
    assert alone.needs == {"pairs"} and alone.computes == ("clip",)
    assert set(alone.losses({"student": both["student"]}, pairs(), frozenset(), STEP).terms) == {"clip"}


def test_the_affinities_have_the_fixed_scale_of_both_sides():
    both, batch = nets(), pairs()
    both["teacher"].module.logit_scale.data.fill_(-3.0)
    embedded = [x for net in both.values() for x in (net.images(batch["pixel_values"]), net.texts(batch["input_ids"]))]
    found = Affinity(scale=50.0).losses(both, batch, frozenset(), STEP).terms["affinity"].sum
    torch.testing.assert_close(found, affinity(*embedded, scale=50.0).sum())


def test_a_run_resumes_exactly(tmp_path: Path):
    rows = TensorRows(pairs(16, torch.float32))

    def trainer(folder: Path, **options) -> DistillTrainer:
        args = arguments(folder, **options)
        both, data = (small_clip(), small_clip(24, seed=1)), {"train_dataset": rows, "eval_dataset": rows}
        return DistillTrainer(*both, args, method=Affinity(share=0.5), data_collator=stacked, **data)

    whole, _ = resumed(trainer, tmp_path)
    assert 0 <= whole.evaluate()["eval_matched"] <= 1


def test_inherited_weights_are_slices_of_the_source_bit_for_bit():
    source = small_clip(16, layers=4, embedding=8, text_width=12)
    student = inherit(source, Tower(layers=2, width=8, neurons=10), Tower(layers=3, width=8), embedding=5)
    ours, theirs = student.state_dict(), source.state_dict()
    for tower, layers in (("vision_model", [0, 2]), ("text_model", [0, 1, 2])):
        assert sum(f"{tower}.encoder" in name and name.endswith("q_proj.weight") for name in ours) == len(layers)
        for new, old in enumerate(layers):
            for part, size in (("self_attn.q_proj.weight", (8, 8)), ("self_attn.out_proj.bias", (8,))):
                mine, other = (f"{tower}.encoder.layers.{i}.{part}" for i in (new, old))
                assert torch.equal(ours[mine], theirs[other][tuple(slice(n) for n in size)]), mine
    assert ours["vision_model.encoder.layers.1.mlp.fc1.weight"].shape == (10, 8)
    assert torch.equal(ours["visual_projection.weight"], theirs["visual_projection.weight"][:5, :8])
    assert torch.equal(ours["logit_scale"], theirs["logit_scale"])
    assert student.vision_model.encoder.layers[0].self_attn.head_dim == 4


def test_inheriting_everything_gives_the_source():
    source = small_clip().eval()
    same = inherit(source, Tower(), Tower()).eval()
    batch = pairs(dtype=torch.float32)
    del batch["index"]
    assert torch.equal(same(**batch).logits_per_image, source(**batch).logits_per_image)


def test_a_size_that_cannot_be_had_is_an_error():
    for towers, message in (
        ((Tower(width=6), Tower()), r"student.vision.width: 6 is not a multiple of 4, the width of a head"),
        ((Tower(), Tower(layers=9)), r"student.text.layers: 9 is larger than the source's 2"),
        ((Tower(), Tower(neurons=99)), r"student.text.neurons: 99 is larger"),
    ):
        with pytest.raises(ValueError, match=message):
            inherit(small_clip(), *towers)


def test_the_section_makes_a_model_or_says_what_is_wrong():
    config = {"projection_dim": 8, "vision_config": {"hidden_size": 16, "num_attention_heads": 2}}
    assert (
        DualEncoderSource(config={**config, "text_config": {"num_hidden_layers": 1}}).configuration().projection_dim
        == 8
    )
    for options, message in (
        ({"config": {"projections": 3}}, "config: CLIPConfig has no projections"),
        ({"path": "./nowhere"}, "nowhere: no such model folder"),
        ({"path": "sandbox:clip"}, "the sandbox has no CLIPModel 'clip'. It has: digits-clip"),
    ):
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            DualEncoderSource(**options).load()
    with pytest.raises(ValueError, match="either path"):
        DualEncoderSource()


@pytest.mark.slow
def test_the_captions_of_the_digits_are_those_that_the_teacher_reads():
    student = InheritedStudent(of=DualEncoderSource(path="sandbox:digits-clip"), vision=Tower(layers=1), embedding=8)
    assert student.load().config.projection_dim == 8
    data = CaptionsSection(images=20).load(0)
    assert (len(data.train), len(data.eval)) == (60, 359)
    batch = data.collator([data.eval[i] for i in range(0, 359, 3)])
    teacher = view(student.of.load().eval())
    with torch.no_grad():
        scores = teacher.images(batch["pixel_values"]) @ teacher.texts(batch["input_ids"], batch["attention_mask"]).T
    right = batch["labels"][scores.argmax(-1)] == batch["labels"]
    assert right.float().mean() > 0.95
