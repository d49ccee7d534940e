"""SquareHead: relative errors of all layers at all real tokens."""

import pytest
import torch
from tiny_models import tiny_model

from kdlm.data import Collator
from kdlm.losses import CrossEntropy, ForwardKL, real_rows
from kdlm.methods import LogitKD, SquareHead, SquareHeadSection, Step
from kdlm.methods.structure.squarehead import EPSILON, relative_error
from kdlm.models import Predictor
from kdlm.networks import counts_of

STEP = Step(0, 10)


def states(rows: int = 7, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator), torch.randn(rows, width, generator=generator)


@pytest.mark.parametrize("scale", [0.3, 3.0, 1e4])
def test_scaling_both_sides_changes_nothing(scale: float) -> None:
    student, teacher = states()
    epsilon = EPSILON / min(1.0, scale**2) / teacher.square().mean(-1).min().item()
    ours, scaled = relative_error(student, teacher), relative_error(scale * student, scale * teacher)
    torch.testing.assert_close(scaled, ours, rtol=epsilon + 1e-6, atol=0)


def test_it_is_nothing_at_equality_one_for_zeros_and_finite_for_a_teacher_of_zeros() -> None:
    student, teacher = states()
    assert (relative_error(teacher, teacher) == 0).all()
    torch.testing.assert_close(relative_error(torch.zeros_like(teacher), teacher), torch.ones(7), rtol=1e-5, atol=0)
    assert relative_error(student, torch.zeros_like(student)).isfinite().all()


def test_where_all_states_are_of_one_size_it_is_the_papers_quotient_of_means() -> None:
    student, teacher = states()
    teacher = 2 * teacher / teacher.square().mean(-1, keepdim=True).sqrt()
    papers = (student - teacher).square().mean() / teacher.square().mean()
    torch.testing.assert_close(relative_error(student, teacher).mean(), papers)


def test_one_large_state_does_not_silence_the_others() -> None:
    student, teacher = states()
    large, also = student.clone(), teacher.clone()
    large[0], also[0] = 1000 * student[0], 1000 * teacher[0]
    torch.testing.assert_close(relative_error(large, also), relative_error(student, teacher), rtol=1e-4, atol=1e-6)
    papers = [(a - b).square().mean() / b.square().mean() for a, b in ((student, teacher), (large, also))]
    alone = (student[0] - teacher[0]).square().mean() / teacher[0].square().mean()
    torch.testing.assert_close(papers[1], alone, rtol=1e-3, atol=0)  # which the quotient of means is silenced by
    assert not torch.isclose(papers[0], papers[1], rtol=0.05)


def test_bfloat16_states_are_compared_in_float32() -> None:
    student, teacher = (x.bfloat16() for x in states())
    assert torch.equal(relative_error(student, teacher), relative_error(student.float(), teacher.float()))


def texts() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (9, 4, 6):
        ids = torch.randint(1, 61, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return made


def reading(batches: list[dict], losses=()) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return the means of a step cut into these batches, and the gradient."""
    student, teacher = (Predictor(tiny_model(seed).double()) for seed in (1, 2))
    method = SquareHead(losses, weight=0.7)
    counts = [counts_of(method, batch) for batch in batches]
    total = {unit: sum(count[unit] for count in counts) for unit in counts[0]}
    means: dict[str, float] = {}
    for batch in batches:
        terms = method.losses({"student": student, "teacher": teacher}, batch, frozenset({"student"}), STEP)
        sum(term.weight * term.sum / total[term.unit] for term in terms.terms.values()).backward()
        for name, (value, unit) in terms.readings().items():
            means[name] = means.get(name, 0.0) + (value / total[unit]).item()
    return means, {name: p.grad for name, p in student.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "losses", [(), (ForwardKL(temperature=2.0), CrossEntropy(weight=0.5))], ids=["alone", "beside"]
)
def test_splitting_padding_and_packing_change_neither_value_nor_gradient(losses) -> None:
    collate = Collator(0)
    whole, gradient = reading([collate(texts())], losses)
    free = Collator(0, layout="padding_free")
    others = [[collate(texts()[:1]), collate(texts()[1:])], [free(texts())]]
    for batches in others:
        means, other = reading(batches, losses)
        assert means == pytest.approx(whole, rel=1e-6)
        for name, value in gradient.items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9)


def test_all_real_tokens_count_and_the_trained_ones_alone_for_token_losses() -> None:
    batch = Collator(0)(texts())
    counts = {unit: int(count) for unit, count in counts_of(SquareHead(), batch).items()}
    assert counts == {"tokens": int((batch["labels"][:, 1:] != -100).sum()), "positions": 9 + 4 + 6}
    nets = {"student": Predictor(tiny_model(1)), "teacher": Predictor(tiny_model(2))}
    ours = SquareHead([ForwardKL()]).losses(nets, batch, frozenset(), STEP)
    plain = LogitKD([ForwardKL()]).losses(nets, batch, frozenset(), STEP)
    torch.testing.assert_close(ours.terms["token_loss"].sum, plain.terms["token_loss"].sum)


def test_the_term_is_the_sum_over_all_decoder_layers() -> None:
    batch = Collator(0)(texts())
    models = {"student": tiny_model(1, layers=3), "teacher": tiny_model(2, layers=3)}
    real, given = batch["attention_mask"].bool(), {"input_ids": batch["input_ids"], "output_hidden_states": True}
    seen = [m(**given, attention_mask=batch["attention_mask"]).hidden_states for m in models.values()]
    nets = {name: Predictor(model) for name, model in models.items()}
    terms = SquareHead().losses(nets, batch, frozenset(), STEP)
    layers = [relative_error(ours[real], theirs[real]).sum() for ours, theirs in zip(*seen, strict=True)][1:-1]
    assert sum(layers).item() < terms.terms["squarehead"].sum.item()  # and the last, before the norm
    _, (ours,) = nets["student"].with_layers(batch, real_rows(batch), [2])
    _, (theirs,) = nets["teacher"].with_layers(batch, real_rows(batch), [2])
    torch.testing.assert_close(sum(layers) + relative_error(ours, theirs).sum(), terms.terms["squarehead"].sum)


def test_a_teacher_of_another_shape_is_refused_in_words() -> None:
    nets = {"student": Predictor(tiny_model(1)), "teacher": Predictor(tiny_model(2, layers=3))}
    with pytest.raises(ValueError, match="the student has 2 layers of width 16, the teacher 3 of width 16"):
        SquareHead().losses(nets, Collator(0)(texts()), frozenset(), STEP)


def test_the_section_builds_it() -> None:
    method = SquareHeadSection(weight=0.2).build([ForwardKL()], None)
    assert isinstance(method, SquareHead) and method.weight == 0.2 and method.paper == "arXiv 2310.06927"
