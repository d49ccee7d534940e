"""Two vocabularies meet on outcomes: what is compared is a coarser view of both, and exact where it is the whole."""

from functools import partial

import pytest
import torch

from kdlm.losses import DKD, JSD, TVD, ForwardKL, Matched, OnOutcomes, Projected, ReverseKL, forward_kl
from kdlm.signal import IGNORE_INDEX, TopK

LOSSES = [ForwardKL(temperature=2.0), ReverseKL(), JSD(beta=0.3, temperature=0.7), TVD(), DKD(beta=2.0)]
ROWS = 6


def logits(vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def identity(kind: str, vocab: int) -> Matched:
    ids = torch.arange(vocab)
    if kind == "projected":
        return Projected.by(ids, ids, torch.ones(vocab, dtype=torch.float64), vocab, vocab)
    return Matched.of(ids, ids, vocab, vocab, rest=kind == "bucket")


@pytest.mark.parametrize("kind", ["bucket", "renormalise", "projected"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_one_vocabulary_gives_the_plain_loss(kind: str, loss) -> None:
    student, teacher, labels = logits(11).requires_grad_(), logits(11, 1), torch.arange(ROWS)
    term = OnOutcomes(loss, identity(kind, 11))
    value, plain = term(student, teacher, labels), loss(student, teacher, labels)
    torch.testing.assert_close(value, plain, rtol=1e-9, atol=1e-9)
    ours, want = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (value, plain))
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["matched", "projected"])
def test_a_trimmed_vocabulary_gives_the_plain_loss_on_what_is_left(kind: str) -> None:
    """The student has every second token of the teacher, under other numbers."""
    their_ids = torch.tensor([8, 2, 0, 6, 4])
    ids = torch.arange(5)
    of = (
        Matched.of(ids, their_ids, 5, 10, rest=True)
        if kind == "matched"
        else Projected.by(ids, their_ids, torch.ones(5), 5, 10)
    )
    student, teacher = logits(5), logits(10, 1)
    value = OnOutcomes(ForwardKL(temperature=1.5), of)(student, teacher, torch.zeros(ROWS, dtype=torch.long))
    torch.testing.assert_close(value, forward_kl(student, teacher[:, their_ids], temperature=1.5))


def test_the_rest_is_one_outcome_with_the_mass_of_all_others() -> None:
    ids, their_ids = torch.tensor([1, 4, 6]), torch.tensor([0, 5, 2])
    of = Matched.of(ids, their_ids, 9, 7, rest=True)
    student, teacher = logits(9), logits(7, 1)
    for temperature in (1.0, 3.0):
        q, p = ((x / temperature).softmax(-1) for x in (student, teacher))
        q, p = (torch.cat([x[:, i], 1 - x[:, i].sum(-1, keepdim=True)], -1) for x, i in ((q, ids), (p, their_ids)))
        want = temperature**2 * (p * (p / q).log()).sum(-1)
        value = OnOutcomes(ForwardKL(temperature=temperature), of)(student, teacher, torch.zeros(ROWS).long())
        torch.testing.assert_close(value, want)


def projected() -> tuple[Projected, torch.Tensor]:
    """Return a projection of 6 student tokens to 5 teacher tokens, and it as a dense matrix with its sink."""
    dense = torch.zeros(6, 5, dtype=torch.float64)
    dense[0, 1] = dense[1, 3] = 1.0  # exact
    dense[2, 1], dense[2, 0] = 0.5, 0.5  # one of them shared with an exact one
    dense[3, 0], dense[4, 2] = 0.25, 0.6  # lose some
    rows, columns = dense.nonzero(as_tuple=True)  # 5 leads nowhere, and nothing leads to the teacher's 4
    of = Projected.by(rows, columns, dense[rows, columns], 6, 5)
    return of, torch.cat([dense, 1 - dense.sum(-1, keepdim=True)], -1)


def test_a_projection_is_the_product_with_its_matrix() -> None:
    of, dense = projected()
    student, teacher = logits(6), logits(5, 1)
    for temperature in (1.0, 2.0):
        q = (student / temperature).softmax(-1) @ dense
        p = (teacher / temperature).softmax(-1)
        want = temperature**2 * (p * (p / torch.cat([q[:, :4], q[:, 5:]], -1)).log()).sum(-1)
        value = OnOutcomes(ForwardKL(temperature=temperature), of)(student, teacher, torch.zeros(ROWS).long())
        torch.testing.assert_close(value, want)


def test_a_label_is_the_outcome_to_which_it_leads_for_certain() -> None:
    of, _ = projected()
    meant = torch.full((6,), IGNORE_INDEX)
    meant[0], meant[1] = of.their_places[1], of.their_places[3]
    assert torch.equal(of.places, meant)


@pytest.mark.parametrize("of", [Matched.of(*torch.tensor([[1, 4, 3], [0, 2, 1]]), 6, 5, rest=True), projected()[0]])
def test_gradients_are_those_of_the_formula(of: Matched) -> None:
    student, teacher = logits(6).requires_grad_(), logits(5, 1).requires_grad_()
    labels = torch.zeros(ROWS).long()
    for loss in LOSSES:
        if loss.name != "tvd":
            assert torch.autograd.gradcheck(
                partial(OnOutcomes(loss, of), teacher=teacher.detach(), labels=labels), student
            )
    OnOutcomes(ForwardKL(), of)(student, teacher, labels).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("of", [Matched.of(*torch.tensor([[1, 4, 3], [0, 2, 1]]), 6, 5, rest=True), projected()[0]])
def test_a_teacher_of_all_its_tokens_by_name_is_the_whole_teacher(of: Matched) -> None:
    student, teacher = logits(6), logits(5, 1)
    few = TopK(torch.arange(5).expand(ROWS, 5), teacher.log_softmax(-1))
    labels = torch.zeros(ROWS).long()
    for loss in (ForwardKL(), JSD()):
        term = OnOutcomes(loss, of)
        torch.testing.assert_close(term(student, few, labels), term(student, teacher, labels), rtol=1e-6, atol=1e-6)
        cut = TopK(few.ids[:, :2], few.log_probs[:, :2])
        assert (term(student, cut, labels) <= term(student, teacher, labels) + 1e-9).all(), "a bound from below"


def test_a_matrix_that_makes_mass_is_refused() -> None:
    for weights in ([0.7, 0.4], [-0.1, 0.2]):
        with pytest.raises(ValueError, match="must not be negative, and those of a row add up to at most 1"):
            Projected.by(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor(weights), 2, 2)


def test_ids_beyond_a_head_are_left_out() -> None:
    of = Matched.of(torch.tensor([0, 3, 9]), torch.tensor([1, 8, 2]), 8, 5, rest=True)
    assert of.ids.tolist() == [0] and of.their_ids.tolist() == [1]
    assert len(of.others) == 7 and len(of.their_others) == 4
