"""layer_matching: a layer that is given the teacher's input is compared with the teacher's layer, alone."""

import pytest
import torch
from weighed_batches import KINDS, STEP, llama, reduced

from kdlm.losses import ForwardKL
from kdlm.methods import LayerMatching
from kdlm.models import Predictor
from kdlm.models.hybrids import hybrid
from kdlm.teachers import LocalTeacher

GIVEN = KINDS["given"]


def batches(cut: list[list[int]]):
    groups = GIVEN.groups()
    return [GIVEN.batch([(groups[i], None) for i in part]) for part in cut]


def nets(student):
    return {"student": Predictor(student.double().eval()), "teacher": LocalTeacher(llama(1))}


def value(method, networks, how="losses"):
    return reduced(method, networks, batches([[0, 1, 2]]), how)


def test_where_no_layer_was_replaced_every_term_is_0() -> None:
    method = LayerMatching([ForwardKL()], layers=[0, 1])
    assert abs(value(method, nets(hybrid(llama(1), [])))[0]) < 1e-8


def test_an_error_below_does_not_reach_a_matched_layer() -> None:
    """The first layer is noise; the second is given what the teacher's second layer was given, and matches it."""
    student = hybrid(llama(1), [])
    for parameter in student.model.layers[0].parameters():
        torch.nn.init.normal_(parameter)
    assert abs(value(LayerMatching(layers=[1]), nets(student))[0]) < 1e-8
    assert value(LayerMatching(layers=[0]), nets(student))[0] > 1e-2


def test_the_value_is_the_mean_square_over_width_layers_and_positions() -> None:
    student, teacher = llama(2), llama(1)
    (batch,) = batches([[0]])
    states = teacher.model(batch["input_ids"], output_hidden_states=True).hidden_states
    x, at = states[0], torch.arange(batch["input_ids"].shape[1])[None]
    theirs = teacher.model.layers[0](x, position_embeddings=teacher.model.rotary_emb(x, at))
    ours = student.model.layers[0](x, position_embeddings=student.model.rotary_emb(x, at))
    ours, theirs = (one[0] if isinstance(one, tuple) else one for one in (ours, theirs))
    found = reduced(LayerMatching(layers=[0]), nets(student), [batch])[0]
    torch.testing.assert_close(found, (ours - theirs).square().mean(), rtol=1e-5, atol=1e-7)


def test_the_replaced_layers_are_matched_unless_others_are_named() -> None:
    networks = nets(hybrid(llama(1), [1]))
    torch.testing.assert_close(value(LayerMatching(), networks)[0], value(LayerMatching(layers=[1]), networks)[0])
    loss = value(LayerMatching(), networks)[0]
    names = [name for name, _ in networks["student"].module.named_parameters()]
    grads = torch.autograd.grad(loss, networks["student"].module.parameters(), allow_unused=True)
    moved = {name for name, grad in zip(names, grads, strict=True) if grad is not None and grad.any()}
    assert moved and all(".layers.1." in name for name in moved)
    assert any(".mamba." in name for name in moved)


def test_the_cut_into_micro_batches_does_not_show() -> None:
    method, networks = LayerMatching([ForwardKL()]), nets(hybrid(llama(1), [1]))
    whole = value(method, networks)[0]
    for cut in ([[0], [1], [2]], [[1], [2, 0]]):
        torch.testing.assert_close(reduced(method, networks, batches(cut))[0], whole, rtol=1e-6, atol=1e-8)


def test_evaluation_has_the_same_term_and_the_measures() -> None:
    networks = nets(hybrid(llama(1), [1]))
    loss, means = value(LayerMatching(), networks, "evaluate")
    torch.testing.assert_close(loss, value(LayerMatching(), networks)[0])
    assert {"layers", "kl_to_teacher"} <= means.keys()


@pytest.mark.parametrize(("layers", "said"), [(None, "no replaced layers"), ([2], "the student has 2 layers")])
def test_what_cannot_be_matched_is_refused(layers, said) -> None:
    with pytest.raises(ValueError, match=said):
        LayerMatching(layers=layers).losses(nets(llama(3)), batches([[0]])[0], frozenset(), STEP)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_student_and_teacher_may_be_of_two_dtypes(dtypes) -> None:
    ours, theirs = (llama(1).to(dtype) for dtype in dtypes)
    networks = {"student": Predictor(ours), "teacher": LocalTeacher(theirs)}
    assert value(LayerMatching(layers=[0, 1]), networks)[0] < 1e-2
    assert value(LayerMatching(layers=[0, 1]), nets(llama(2)))[0] > 1
