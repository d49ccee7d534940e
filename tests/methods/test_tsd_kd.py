"""TSD-KD: which tokens each term takes, the same whatever stands beside the sequence, and what training does."""

import pytest
import torch
from bigram import Table, Text, batch_of, descend, gradients, texts, total, written

from kdlm.losses import ForwardKL, Selective, entropy, gated_jsd, generalised_jsd, kept_rows, plackett_luce
from kdlm.methods import Step, TsdKD, TsdKDSection
from kdlm.methods.sequences import group_rows
from kdlm.methods.tsd_kd import most_uncertain, opening

LENGTHS = [25, 9, 4, 32, 17, 3, 28, 16]
LAYOUTS = {
    "batches of one": lambda chosen: [batch_of([text]) for text in chosen],
    "uneven batches": lambda chosen: [batch_of(chosen[:3]), batch_of(chosen[3:5]), batch_of(chosen[5:])],
    "padding-free": lambda chosen: [batch_of(chosen, "padding_free")],
    "another order": lambda chosen: [batch_of(chosen[::-1], "padding_free")],
    "plain data": lambda chosen: [batch_of(chosen, told=False)],
}


def own_texts(lengths, **options):
    return texts(lengths, sampled=[True] * len(lengths), **options)


@pytest.fixture
def nets() -> dict[str, Table]:
    return {"student": Table(1), "teacher": Table(2)}


def by_the_book(nets, text, *, a=0.1, c=0.1, u=0.1, k=10):
    """One sequence, from whole logits, its tokens chosen one after the other."""
    batch = batch_of([text])
    rows = kept_rows(batch["labels"])
    z, other = (rows.select(nets[name].logits()[batch["input_ids"]]) for name in ("student", "teacher"))
    entropies = entropy(z).tolist()
    opener, reached = 0, 0.0
    while opener == 0 or reached < c * sum(entropies):
        reached += entropies[opener]
        opener += 1
    least = sorted(entropies)[-max(1, -(-len(entropies) * round(100 * u) // 100))]
    unsure = [i for i, nats in enumerate(entropies) if nats >= least]
    first = slice(0, opener)
    return (
        a * plackett_luce(z[first], other[first], k=k).mean() + gated_jsd(z, other).mean() + entropy(z)[unsure].mean()
    )


# Of a table all occurrences of a token have one entropy; a tie is not what the book above is for.
def distinct(text: Text) -> Text:
    return Text(list(dict.fromkeys(text.ids)), 1, text.sampled)


@pytest.mark.parametrize("width", [None, 5])
@pytest.mark.parametrize("options", [{}, {"opener": 0.4, "uncertain": 0.3, "candidates": 4, "indirect_weight": 2.0}])
def test_value_and_gradient_are_those_of_the_formula(width, options):
    nets = {"student": Table(1, width=width), "teacher": Table(2, width=width)}
    chosen = [distinct(text) for text in own_texts([12, 30, 20, 9])]
    book = dict(
        zip(
            "acuk",
            (
                options.get(name, usual)
                for name, usual in (("indirect_weight", 0.1), ("opener", 0.1), ("uncertain", 0.1), ("candidates", 10))
            ),
            strict=True,
        )
    )
    expected = torch.stack([by_the_book(nets, text, **book) for text in chosen]).mean()
    method, batch = TsdKD(chunk_rows=4, **options), [batch_of(chosen)]
    torch.testing.assert_close(total(method, nets, batch), expected)
    plain = torch.autograd.grad(expected, nets["student"].parameters)
    torch.testing.assert_close(gradients(method, nets, batch), list(plain))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_sequences_are_batched_does_not_show(nets, layout):
    chosen = own_texts(LENGTHS)
    whole = gradients(TsdKD(), nets, [batch_of(chosen)])
    assert whole[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients(TsdKD(), nets, LAYOUTS[layout](chosen)), whole)


def test_the_opener_of_a_sequence_depends_on_no_other():
    draw = torch.Generator().manual_seed(0)
    lengths = [7, 1, 30, 12]
    own = [torch.rand(n, generator=draw, dtype=torch.float64) ** 4 for n in lengths]
    numbers = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    together = opening(torch.cat(own), *group_rows(numbers), 0.3).split(lengths)
    for entropies, found in zip(own, together, strict=True):
        alone = opening(entropies, *group_rows(torch.zeros(len(entropies), dtype=torch.long)), 0.3)
        assert torch.equal(found, alone)
        opener = int(alone.sum())
        assert alone[:opener].all() and not alone[opener:].any()
        share = entropies.cumsum(0) / entropies.sum()
        assert share[opener - 1] >= 0.3 - 1e-12 and (opener == 1 or share[opener - 2] < 0.3)


def test_a_certain_student_still_has_an_opener_of_one_token():
    group, lengths = group_rows(torch.tensor([0, 0, 0, 1, 1]))
    assert opening(torch.zeros(5), group, lengths, 0.1).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize(("length", "many"), [(1, 1), (9, 1), (10, 1), (11, 2), (30, 3), (31, 4)])
def test_a_tenth_of_the_tokens_is_uncertain_rounded_up(length, many):
    draw = torch.Generator().manual_seed(length)
    entropies = torch.rand(length, generator=draw)
    found = most_uncertain(entropies, *group_rows(torch.zeros(length, dtype=torch.long)), 0.1)
    assert torch.equal(entropies[found].sort().values, entropies.sort().values[-many:])
    tied = most_uncertain(torch.ones(length), *group_rows(torch.zeros(length, dtype=torch.long)), 0.1)
    assert tied.tolist() == [True] * many + [False] * (length - many)


def test_equally_certain_models_are_matched_at_half_the_divergence():
    """A teacher with the student's entropies: the same rows, their columns in another order."""
    nets = {"student": Table(1), "teacher": Table(1)}
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    nets["teacher"].rows = nets["teacher"].rows.detach()[:, order]
    batch = batch_of(own_texts([9]))
    rows = kept_rows(batch["labels"])
    half = generalised_jsd(*(nets[name](batch, rows).logits for name in ("student", "teacher")), beta=0.9).mean() / 2
    direct, unit = TsdKD().losses(nets, batch, frozenset(), Step(0, 1)).metrics["direct"]
    torch.testing.assert_close(direct, half.detach())
    assert unit == "sequences"


@pytest.mark.parametrize("shared", [13, torch.arange(13)])
def test_only_the_shared_ids_are_compared(shared):
    """The student's head has three rows of padding; its candidates and entropies must not see them."""
    cut = {"student": Table(1), "teacher": Table(2)}
    padding = torch.full((13, 3), 9.0, dtype=torch.float64)
    padded = {"student": Table(1), "teacher": cut["teacher"]}
    padded["student"].rows = torch.cat([cut["student"].rows.detach(), padding], -1).requires_grad_()
    batch = [batch_of(own_texts([9, 5]))]
    [ours] = gradients(TsdKD(vocab=shared), padded, batch)
    [plain] = gradients(TsdKD(), cut, batch)
    torch.testing.assert_close(ours[:, :13], plain)
    assert ours[:, 13:].abs().max() == 0


def test_without_rows_every_name_is_still_reported(nets):
    terms = TsdKD().losses(nets, batch_of(own_texts([2, 2])), frozenset(), Step(0, 1))
    assert {"indirect", "direct", "entropy"} <= set(terms.readings()) and terms.terms["tsd_kd"].sum == 0


def test_evaluation_adds_the_measures(nets):
    readings = TsdKD().evaluate(nets, batch_of(own_texts([9, 5])), Step(0, 1)).readings()
    assert {"indirect", "direct", "entropy", "kl_to_teacher", "cross_entropy", "top1_agreement"} <= set(readings)
    assert TsdKD().text(Step(0, 9), 0.3) == "student"


def test_losses_beside_its_own_are_refused():
    with pytest.raises(ValueError, match="leave out forward_kl"):
        TsdKDSection().build([ForwardKL()], None)


def test_options_of_the_section_reach_the_method():
    method = TsdKDSection(
        indirect_weight=0.7, candidates=4, beta=0.3, gate_temperature=2.0, opener=0.2, uncertain=0.5
    ).build([], None)
    assert method.selective == Selective(weight=0.7, k=4, beta=0.3, gate_temperature=2.0)
    assert (method.opener, method.uncertain) == (0.2, 0.5)


@torch.no_grad()
def agreement(nets, k=5):
    """Kendall's tau between both models' orders of the student's k most probable tokens, on its own text."""
    batch = batch_of(written(nets["student"], 200, 12, 99, sampled=True))
    rows = kept_rows(batch["labels"])
    z, other = (nets[name](batch, rows).logits for name in ("student", "teacher"))
    best, candidates = z.topk(k)
    theirs = other.gather(-1, candidates)
    first, second = torch.triu_indices(k, k, 1)
    return ((best[:, first] - best[:, second]).sign() * (theirs[:, first] - theirs[:, second]).sign()).mean().item()


def test_the_student_comes_to_rank_its_candidates_as_the_teacher_does_and_by_the_ranking_term():
    rises = {1.0: [], 0.0: []}
    for seed in range(3):
        for weight, found in rises.items():
            nets = {"student": Table(10 + seed, scale=1.0), "teacher": Table(50 + seed)}
            before = agreement(nets)
            for step in range(40):
                batch = batch_of(written(nets["student"], 32, 12, step, sampled=True))
                descend(TsdKD(indirect_weight=weight), nets, [batch], rate=1.0)
            found.append(agreement(nets) - before)
    assert min(rises[1.0]) > 0.5 > 0.2 > max(rises[0.0])
