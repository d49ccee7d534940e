"""Losses as recipe pieces: names, options, and which teachers they take."""

from inspect import signature
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import kdlm.losses
from kdlm.losses import AnyLoss, CrossEntropy, CustomLoss, Divergence, Loss, SkewKL, numbered_names, skew_kl
from kdlm.signal import Dense, Hidden, Sampled, TopK

ADAPTER = TypeAdapter(AnyLoss)
KINDS: tuple[type[Loss], ...] = get_args(get_args(AnyLoss)[0])
LABELS = torch.tensor([3, 1])


def squared_difference(student, teacher, labels, *, factor):
    return factor * ((student - teacher) ** 2).sum(-1) + labels


def of_kind(kind, draw):
    """Return what a loss sees of a teacher that gives a signal of this class."""
    log_probs, ids = draw(2, 7).log_softmax(-1).topk(3)
    return {Dense: draw(2, 7), Hidden: draw(2, 7), TopK: TopK(ids, log_probs), Sampled: Sampled(ids, log_probs.exp())}[
        kind
    ]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not CustomLoss])
def test_each_takes_the_signals_it_declares_and_refuses_the_others(kind, draw):
    loss = ADAPTER.validate_python({"name": kind.model_fields["name"].default})
    assert isinstance(loss, kind)
    for signal in (Dense, Hidden, TopK, Sampled):
        if signal in kind.signals:
            assert loss(draw(2, 7), of_kind(signal, draw), LABELS).shape == (2,)
        else:
            with pytest.raises(ValueError, match=signal.__name__):
                loss(draw(2, 7), of_kind(signal, draw), LABELS)
    if kind.needs_teacher:
        with pytest.raises(ValueError, match="no teacher"):
            loss(draw(2, 7), None, LABELS)
    else:
        assert loss(draw(2, 7), None, LABELS).shape == (2,)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(kind, Divergence)])
def test_the_fields_are_the_keywords_of_the_function_with_the_same_defaults(kind):
    parameters = signature(kind.divergence).parameters.values()
    assert kind().options() == {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_options_reach_the_function(draw):
    student, teacher = draw(2, 7), draw(2, 7)
    loss = SkewKL(skew=0.3, temperature=2.0, t_squared=False)
    expected = skew_kl(student, teacher, skew=0.3, temperature=2.0, t_squared=False)
    torch.testing.assert_close(loss(student, teacher, LABELS), expected)


def test_a_custom_loss_is_named_by_module_and_function(draw):
    student, teacher = draw(2, 7), draw(2, 7)
    loss = ADAPTER.validate_python(
        {"name": "custom", "target": f"{__name__}:squared_difference", "args": {"factor": 2.0}, "weight": 0.5}
    )
    assert loss.weight_at(0.0, 0) == 0.5
    expected = squared_difference(student, teacher, LABELS, factor=2.0)
    torch.testing.assert_close(loss(student, teacher, LABELS), expected)


def test_a_custom_loss_that_cannot_be_imported_says_so(draw):
    with pytest.raises(ValueError, match="nowhere:nothing"):
        CustomLoss(target="nowhere:nothing")(draw(2, 7), draw(2, 7), LABELS)


def test_the_same_loss_twice_gets_two_names():
    losses = [ADAPTER.validate_python({"name": name}) for name in ("forward_kl", "jsd", "forward_kl", "forward_kl")]
    assert numbered_names(losses) == ["forward_kl", "jsd", "forward_kl_1", "forward_kl_2"]


@pytest.mark.parametrize(
    "wrong", [{"name": "forward_kl", "temprature": 2}, {"name": "jsd", "beta": 2}, {"name": "kl"}, {"temperature": 0}]
)
def test_a_wrong_recipe_is_refused(wrong):
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(wrong)


def test_every_field_is_described_for_the_recipe_reference():
    for definition in ADAPTER.json_schema()["$defs"].values():
        for name, field in definition["properties"].items():
            assert name in ("name", "target", "args") or "description" in field, (definition["title"], name)


def test_what_the_room_exports_exists():
    assert all(hasattr(kdlm.losses, name) for name in kdlm.losses.__all__)
    assert not CrossEntropy.needs_teacher
