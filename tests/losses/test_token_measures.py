"""Every measure, held against scipy, scikit-learn and formulas written out in float64."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from scipy.stats import entropy
from sklearn.metrics import log_loss, top_k_accuracy_score

from kdlm.losses import all_measures_for, measures_for, total_variation, weighted_sum
from kdlm.signal import Dense, Draws, Head, Hidden, Sampled, TopK

ROWS, VOCAB = 53, 97
FORMS = (Dense, Hidden)


@pytest.fixture
def pair(draw):
    """Student and teacher with heads of different size, of which the first 97 ids are shared, and labels."""
    student = Hidden(draw(ROWS, 6), Head(draw(VOCAB + 9, 6), draw(VOCAB + 9)))
    teacher = Hidden(draw(ROWS, 10), Head(draw(VOCAB + 20, 10) / 2))
    return student, teacher, torch.arange(ROWS) % VOCAB


def logits(model):
    return model.head.logits(model.hidden)


def measured(student, teacher, labels, vocab=VOCAB, names=None, **options):
    names = all_measures_for(None if teacher is None else type(teacher)) if names is None else names
    return weighted_sum([], student, teacher, labels, vocab=vocab, measures=names, **options)[1]


def softmax(z):
    return z.softmax(-1).numpy()


def brier(p, labels):
    return ((p - np.eye(p.shape[1])[labels]) ** 2).sum(-1)


def test_measures_are_what_scipy_and_scikit_learn_say(pair):
    student, teacher, labels = pair
    found = {name: value.numpy() for name, value in measured(*pair).items()}
    q, p = softmax(logits(student)), softmax(logits(teacher)[:, :VOCAB])
    shared = softmax(logits(student)[:, :VOCAB])
    five = [set(np.argsort(-row)[:5]) for row in shared], [set(np.argsort(-row)[:5]) for row in p]
    expected = {
        "student_entropy": entropy(q, axis=-1),
        "teacher_entropy": entropy(p, axis=-1),
        "kl_to_teacher": entropy(p, shared, axis=-1),
        "reverse_kl_to_teacher": rel_entr(shared, p).sum(-1),
        "acceptance_rate": np.minimum(p, shared).sum(-1),
        "confidence": q.max(-1),
        "teacher_confidence": p.max(-1),
        "brier": brier(q, labels),
        "teacher_brier": brier(p, labels),
        "teacher_accuracy": p.argmax(-1) == labels.numpy(),
        "top1_agreement": shared.argmax(-1) == p.argmax(-1),
        "top5_agreement": [len(ours & theirs) / 5 for ours, theirs in zip(*five, strict=True)],
    }
    for name, rows in expected.items():
        np.testing.assert_allclose(found[name], rows, rtol=1e-9, atol=1e-12, err_msg=name)
    ids = np.arange(q.shape[1])
    assert found["cross_entropy"].mean() == pytest.approx(log_loss(labels, q, labels=ids))
    assert found["teacher_cross_entropy"].mean() == pytest.approx(log_loss(labels, p, labels=ids[:VOCAB]))
    assert found["accuracy"].mean() == pytest.approx(top_k_accuracy_score(labels, q, k=1, labels=ids))
    distance = total_variation(logits(student)[:, :VOCAB], logits(teacher)[:, :VOCAB]).numpy()
    np.testing.assert_allclose(found["acceptance_rate"], 1 - distance)


def test_a_student_that_is_its_teacher_agrees_in_everything(pair):
    student, _, labels = pair
    found = measured(student, student, labels, vocab=None)
    for name in ("kl_to_teacher", "reverse_kl_to_teacher"):
        torch.testing.assert_close(found[name], torch.zeros(ROWS, dtype=torch.float64), atol=1e-14, rtol=0)
    for name in ("top1_agreement", "top5_agreement", "acceptance_rate"):
        torch.testing.assert_close(found[name], torch.ones(ROWS, dtype=torch.float64))
    for name in ("cross_entropy", "brier", "confidence", "accuracy"):
        torch.testing.assert_close(found[name], found[f"teacher_{name}"])
    torch.testing.assert_close(found["student_entropy"], found["teacher_entropy"])


@pytest.mark.parametrize("rows", [1, 7, ROWS])
@pytest.mark.parametrize("form", FORMS)
def test_chunks_and_the_form_of_either_side_change_nothing(pair, rows, form):
    student, teacher, labels = pair
    if form is Dense:
        student, teacher = Dense(logits(student)), Dense(logits(teacher))
    right, found = measured(*pair), measured(student, teacher, labels, chunk_rows=rows)
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=1e-9, atol=1e-12, msg=name)
        alone = measured(student, teacher, labels, names=[name])[name]  # by the kernels, where they know it
        torch.testing.assert_close(alone, right[name], rtol=1e-9, atol=1e-12, msg=name)


def test_shared_ids_may_be_a_list_and_a_label_beyond_them_counts_as_wrong(pair):
    student, teacher, labels = pair
    ids = torch.arange(1, VOCAB, 3)
    found = measured(student, teacher, labels, vocab=ids)
    right = measured(Dense(logits(student)[:, ids]), Dense(logits(teacher)[:, ids]), labels * 0, vocab=None)
    for name in ("reverse_kl_to_teacher", "acceptance_rate", "top5_agreement", "teacher_entropy", "teacher_confidence"):
        torch.testing.assert_close(found[name], right[name])
    outside = ~torch.isin(labels, ids)
    assert outside.any() and not found["teacher_accuracy"][outside].any()
    p = logits(teacher)[:, ids].softmax(-1)
    torch.testing.assert_close(found["teacher_brier"][outside], p.square().sum(-1)[outside] + 1)


def test_a_teacher_that_gives_a_few_tokens_gives_bounds_and_says_the_rest_exactly(pair):
    student, teacher, labels = pair
    log_p, ids = logits(teacher)[:, :VOCAB].log_softmax(-1).topk(8)
    exact, few = measured(*pair), measured(student, TopK(ids, log_p), labels)
    for name in ("kl_to_teacher", "reverse_kl_to_teacher", "teacher_entropy"):
        assert (few[name] <= exact[name] + 1e-12).all() and (few[name] < exact[name]).any()
    assert (few["acceptance_rate"] >= exact["acceptance_rate"] - 1e-12).all()
    for name in ("top1_agreement", "top5_agreement", "teacher_confidence", "teacher_accuracy", "brier", "confidence"):
        torch.testing.assert_close(few[name], exact[name])
    assert "teacher_brier" not in few and "teacher_cross_entropy" not in few
    with pytest.raises(ValueError, match="5 most probable tokens are wanted, and it gives 4"):
        measured(student, TopK(ids[:, :4], log_p[:, :4]), labels, names=["top5_agreement"])


@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_all_of_a_vocabulary_of_three_is_among_its_top_five(draw, kind):
    labels, log_p = torch.arange(ROWS) % 3, draw(ROWS, 3).log_softmax(-1)
    teacher = Dense(log_p) if kind == "dense" else TopK(*log_p.topk(3)[::-1])
    found = measured(Dense(draw(ROWS, 3)), teacher, labels, vocab=None, names=["top5_agreement"])
    assert (found["top5_agreement"] == 1).all()


def test_draws_from_the_rest_make_forward_kl_unbiased_and_leave_the_other_bounds(pair):
    student, teacher, labels = pair
    log_p, ids = logits(teacher)[:, :VOCAB].log_softmax(-1).sort(descending=True)
    p, kept = log_p.exp(), 6
    everything = Draws(ids[:, kept:], log_p[:, kept:], p[:, kept:] / p[:, kept:].sum(-1, keepdim=True))
    found = measured(student, TopK(ids[:, :kept], log_p[:, :kept], everything), labels)
    torch.testing.assert_close(found["kl_to_teacher"], measured(*pair)["kl_to_teacher"], rtol=1e-6, atol=1e-6)
    bare = measured(student, TopK(ids[:, :kept], log_p[:, :kept]), labels)
    torch.testing.assert_close(found["reverse_kl_to_teacher"], bare["reverse_kl_to_teacher"])


def test_what_a_teacher_rules_out_is_handled_as_a_probability_of_nothing(pair):
    student, teacher, labels = pair
    z = logits(teacher)[:, :VOCAB].clone()
    z[:, 60:] = -torch.inf
    found = measured(student, Dense(z), labels, names=all_measures_for(Dense))
    p, shared = softmax(z), softmax(logits(student)[:, :VOCAB])
    np.testing.assert_allclose(found["kl_to_teacher"], rel_entr(p, shared).sum(-1))
    np.testing.assert_allclose(found["teacher_entropy"], entropy(p, axis=-1))
    np.testing.assert_allclose(found["acceptance_rate"], np.minimum(p, shared).sum(-1))
    assert found["reverse_kl_to_teacher"].isposinf().all()
    assert found["teacher_brier"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_measured_in_single(pair, dtype):
    student, teacher = (Dense(logits(one).to(dtype)) for one in pair[:2])
    labels = pair[2]
    found = measured(student, teacher, labels)
    exact = measured(Dense(student.logits.double()), Dense(teacher.logits.double()), labels)
    for name, rows in found.items():
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.double(), exact[name], rtol=1e-4, atol=1e-5, msg=name)


def test_what_is_watched_by_default_is_what_the_kernels_take_and_more_is_by_name(pair):
    student, _, labels = pair
    for kind in (Dense, Hidden, TopK, Sampled, None):
        every = all_measures_for(kind)
        assert every[: len(measures_for(kind))] == measures_for(kind)
        assert len(set(every)) == len(every)
    assert all_measures_for(Sampled) == all_measures_for(None)
    with pytest.raises(ValueError, match=r"with no teacher there are .*brier"):
        measured(student, None, labels, vocab=None, names=["teacher_entropy"])


def test_no_rows_give_every_name_without_values(pair):
    student, teacher, labels = pair
    nobody, nothing = Hidden(student.hidden[:0], student.head), Hidden(teacher.hidden[:0], teacher.head)
    found = measured(nobody, nothing, labels[:0])
    assert set(found) == set(all_measures_for(Hidden)) and all(rows.shape == (0,) for rows in found.values())
