"""A row of weight w counts as w copies of it, in the sum and in what the sum is divided by: every method, one law."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from two_tokenizers import paired_rows
from weighed_batches import KINDS, gradient, networks_of, own, reduced

from kdlm.data import Collator, PairCollator
from kdlm.data.packing import packed_row
from kdlm.losses import CrossEntropy, ForwardKL, ReverseKL
from kdlm.methods import AlignedMethod, AnyMethod, Method, TokenMethod
from kdlm.methods.self_distillation.agreement import Agreement
from kdlm.methods.self_distillation.unisd import Contrast
from kdlm.networks import counts_of
from kdlm.rollouts import as_row

KL, CE = ForwardKL(), CrossEntropy(weight=0.3)
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "logit_kd": ("given", [KL, CE], {}),
    "taid": ("given", [CE], {}),
    "sequence_kd": ("given", [], {}),
    "hidden_kd": ("given", [KL], {"layers": [(0, 0), (1, 1)]}),
    "squarehead": ("given", [KL], {}),
    "layer_matching": ("given", [KL], {"layers": [0, 1]}),
    "acm": ("adaptive", [KL], {"entropy_weight": 0.5}),
    "acm of learners": ("adaptive", [], {"stage": "learners"}),
    "acm of gates": ("adaptive", [], {"stage": "gates"}),
    "reverse_kl_advantage": ("both", [CE], {"prefix_weighting": 0.5}),
    "minillm": ("own", [], {}),
    "gkd": ("both", [KL], {}),
    "distillm2": ("both", [], {"curriculum": True}),
    "redi": ("preferences", [], {}),
    "tsd_kd": ("own", [], {"candidates": 4}),
    "token_ps_kd": ("given", [], {}),
    "curio_sft": ("given", [], {}),
    "guided_generations": ("given", [], {"generation_steps": 2}),
    "recursive_kd": ("given", [], {"generation_steps": 2}),
    "further_pretraining": ("given", [], {}),
    "further_pretraining of sequences": ("given", [], {"over": "sequences", "reduction": "mean"}),
    "step_by_step": ("given", [], {}),
    "masked_kd": ("masked", [KL, CE], {}),
    "minilm": ("given", [KL, CE], {"relation_heads": 4}),
    "minilm of masked models": ("masked", [], {"relations": ["qk", "vv"]}),
    "tinybert": ("given", [], {}),
    "tinybert of masked models": ("masked", [KL, CE], {}),
    "gdsd": ("masked_own", [], {"masks": 2}),
    "alm": ("pairs", [CE], {}),
    "alm by tokens": ("pairs", [], {"per": "token", "debias": 0.1}),
    "byte_kd": ("bytes", [KL, CE], {}),
    "uld": ("pairs", [CE], {}),
    "uld of chunks": ("pairs", [], {"pairing": "chunks"}),
    "gold": ("pairs", [], {}),
    "shared_vocabulary_kd": ("pairs", [KL], {}),
    "vocabulary_projection": ("pairs", [KL], {}),
    "tokenizer_transfer": ("pairs", [], {}),
    "dskd": ("pairs", [CE], {}),
    "llava_kd": ("visual", [KL], {}),
    "self_distillation": ("told", [KL], {"clip": 3.0}),
    "self_distillation of own text": ("told_own", [ReverseKL()], {"importance_cap": 2.0}),
    "sdpo": ("told_own", [], {}),
    "sdpo of distributions": ("told_own", [KL], {"top_k": 5}),
    "sd_zero_revision": ("turns", [], {}),
    "sd_zero": ("told_own", [], {}),
    "skill_sd": ("told_own", [], {"weight": 0.5}),
    "unisd": ("told", [], {"agreement": Agreement(), "contrast": Contrast(), "features": 0.1, "clip_quantile": 0.8}),
    "policy_gradient": ("own", [KL], {"scaled": True}),
    "rltf_sd": ("turns", [], {}),
    "rltf_fm": ("turns", [], {}),
    "score": ("turns", [], {"stage": 2}),
    "pi_distill": ("told_own", [], {}),
}
"""Method (and what of it) -> the kind of rows, its losses and options."""


def sections() -> dict[str, Any]:
    return {one.model_fields["name"].default: one for one in get_args(get_args(AnyMethod)[0])}


def made(case: str) -> tuple[Method, Any]:
    kind, losses, options = CASES[case]
    method = sections()[case.split()[0]](**options).build(losses, None)
    if isinstance(method, AlignedMethod):
        method.introduce(*KINDS[kind].collate("padded").spellings)
    return method, KINDS[kind]


def layouts(kind: Any) -> list[str]:
    return ["padded"] if kind is KINDS["visual"] else ["padded", "padding_free"]


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(one) for one in kind.__subclasses__()))


def test_every_method_either_counts_rows_by_their_weights_or_refuses_them():
    """Methods of text have a case here, and count; those of images and samples, and those that TRL runs, refuse."""
    of_text = {name for name, one in sections().items() if issubclass(getattr(one, "method", object), TokenMethod)}
    assert of_text == {case.split()[0] for case in CASES}
    assert all(made(case)[0].weighs for case in CASES)
    assert not any(one.weighs for one in subclasses(Method) - subclasses(TokenMethod))


@pytest.mark.parametrize("how", ["losses", "evaluate"])
@pytest.mark.parametrize("case", CASES)
def test_a_row_of_weight_2_is_there_twice_and_one_of_weight_0_not_at_all(case: str, how: str):
    """Groups of weights 2, 0 and 1 in one batch, in any layout and cut, against three micro-batches without weights."""
    method, kind = made(case)
    nets = networks_of(method, kind)
    a, b, c = kind.groups()
    copies = [kind.batch([(group, None)]) for group in (a, a, c)]
    want, means = reduced(method, nets, copies, how)
    assert want != 0 and torch.isfinite(want)
    cut = [kind.batch([(a, 2.0), (b, 0.0)]), kind.batch([(c, 1.0)])]
    for batches in (*([kind.batch([(a, 2.0), (b, 0.0), (c, 1.0)], layout)] for layout in layouts(kind)), cut):
        loss, found = reduced(method, nets, batches, how)
        torch.testing.assert_close(loss, want, rtol=1e-7, atol=1e-9)
        assert found.keys() == means.keys()
        for name, mean in means.items():
            torch.testing.assert_close(found[name], mean, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        if how == "losses":
            got = gradient(loss, nets)
            again, _ = reduced(method, nets, copies, how)
            wanted = gradient(again, nets)
            assert wanted.abs().max() > 1e-5
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_weights_of_1_change_no_bit_and_those_of_3_no_mean(case: str):
    method, kind = made(case)
    nets = networks_of(method, kind)
    without, ones, threes = (
        reduced(method, nets, [kind.batch([(group, weight) for group in kind.groups()])])[0]
        for weight in (None, 1.0, 3.0)
    )
    assert torch.equal(ones, without)
    plain = gradient(without, nets)
    assert torch.equal(gradient(ones, nets), plain)
    torch.testing.assert_close(gradient(threes, nets), plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["logit_kd", "taid", "hidden_kd", "further_pretraining of sequences"])
def test_a_packed_row_has_a_weight_for_each_of_its_sequences(case: str):
    method, kind = made(case)
    nets = networks_of(method, kind)
    rows = [row | {"weight": weight} for (row,), weight in zip(kind.groups(), (2.0, 0.0, 0.5), strict=True)]
    packed = Collator(0, layout="padding_free")([packed_row(rows[:2]), packed_row(rows[2:])])
    assert packed["weight"].tolist() == [2.0, 0.0, 0.5]
    padded = reduced(method, nets, [Collator(0)(rows)])[0]
    loss = reduced(method, nets, [packed])[0]
    torch.testing.assert_close(gradient(loss, nets), gradient(padded, nets), rtol=1e-6, atol=1e-8)


def test_packed_rows_of_two_readings_have_weights_in_both():
    method, kind = made("alm")
    nets = networks_of(method, kind)
    rows = [row | {"weight": weight} for row, weight in zip(paired_rows()[:3], (2.0, 0.0, 0.5), strict=True)]
    collate: PairCollator = kind.collate("padding_free")
    means = [
        reduced(method, nets, [batch], "evaluate")
        for batch in (kind.collate("padded")(rows), collate([packed_row(rows)]))
    ]
    torch.testing.assert_close(means[0][0], means[1][0], rtol=1e-6, atol=1e-8)
    for name, mean in means[0][1].items():
        torch.testing.assert_close(means[1][1][name], mean, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_small_weights_are_divided_by_their_own_sum():
    """Weights of 1/1000 add up to less than one row, and are no smaller a step."""
    method, kind = made("logit_kd")
    nets = networks_of(method, kind)
    small, whole = (reduced(method, nets, [kind.batch([(g, w) for g in kind.groups()])])[0] for w in (2.0**-10, None))
    torch.testing.assert_close(small, whole, rtol=1e-9, atol=0)


def test_rows_of_weight_0_alone_leave_loss_and_gradient_0():
    method, kind = made("logit_kd")
    nets = networks_of(method, kind)
    loss, _ = reduced(method, nets, [kind.batch([(group, 0.0) for group in kind.groups()])])
    assert loss == 0 and not gradient(loss, nets).any()


def test_a_completion_has_the_weight_of_the_row_whose_prompt_it_follows():
    one = own(1, 0)
    assert as_row(replace(one, row=one.row | {"weight": 0.25}), masked=False)["weight"] == 0.25
    assert "weight" not in as_row(one, masked=False)


def test_a_method_that_counts_all_rows_alike_refuses_weights_by_name():
    related = sections()["hidden_kd"](distance="rkd").build([], None)
    batch = KINDS["given"].batch([(group, 1.0) for group in KINDS["given"].groups()])
    with pytest.raises(ValueError, match=r"columns\.weight.*HiddenKD counts all alike"):
        counts_of(related, batch)
