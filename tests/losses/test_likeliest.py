"""The most probable tokens of student and teacher: those of a plain topk, in every form and chunk."""

import pytest
import torch

from kdlm.losses import likeliest
from kdlm.signal import Dense, Head, Hidden, Mixture, Sampled, TopK

ROWS, VOCAB = 23, 61


@pytest.fixture
def pair(draw):
    student = Hidden(draw(ROWS, 6), Head(draw(VOCAB + 4, 6)))
    return student, Hidden(draw(ROWS, 5), Head(draw(VOCAB, 5)))


def logits(model):
    return model.head.logits(model.hidden)


def check(found, z, ids=None):
    p, places = z.softmax(-1).topk(found.ids.shape[1])
    torch.testing.assert_close(found.probabilities, p)
    assert torch.equal(found.ids, places if ids is None else ids[places])


@pytest.mark.parametrize("rows", [1, 7, None])
def test_they_are_those_of_topk_whatever_the_chunks(pair, rows):
    student, teacher = pair
    ours, theirs = likeliest(student, teacher, 5, vocab=VOCAB, chunk_rows=rows)
    check(ours, logits(student))
    check(theirs, logits(teacher))


def test_a_list_of_shared_ids_names_the_teachers_tokens_as_they_are(pair):
    student, teacher = pair
    ids = torch.arange(2, VOCAB, 3)
    _, theirs = likeliest(student, teacher, 4, vocab=ids)
    check(theirs, logits(teacher)[:, ids], ids)


def test_few_tokens_a_mixture_and_no_distribution(pair):
    student, teacher = pair
    log_p, ids = logits(teacher).log_softmax(-1).topk(3)
    theirs = likeliest(student, TopK(ids, log_p), 5, vocab=VOCAB)[1]
    check(theirs, logits(teacher))
    assert theirs.ids.shape[1] == 3
    weights = torch.full((ROWS, 2), 0.5, dtype=torch.float64).log()
    both = Mixture((teacher, Dense(logits(student)[:, :VOCAB])), weights)
    p = (logits(teacher).softmax(-1) + logits(student)[:, :VOCAB].softmax(-1)) / 2
    check(likeliest(student, both, 5, vocab=VOCAB)[1], p.log())
    for nobody in (None, Sampled(ids, log_p.exp())):
        assert likeliest(student, nobody, 5)[1] is None


def test_no_rows_give_none(pair):
    student, teacher = (Hidden(one.hidden[:0], one.head) for one in pair)
    ours, _ = likeliest(student, teacher, 5, vocab=VOCAB)
    assert ours.ids.shape == (0, 5)
