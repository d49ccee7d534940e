"""DistiLLM-2: each side its divergence, averaged within responses and then over them."""

import copy

import pytest
import torch
from bigram import Table, Text, batch_of, descend, gradients, texts, total, written
from pydantic import ValidationError

from kdlm.losses import ForwardKL, Linear, kept_rows, reverse_kl, skew_kl, skew_reverse_kl
from kdlm.methods import DistiLLM2, DistiLLM2Section, Step
from kdlm.signal import Dense, TopK

LENGTHS = [5, 9, 4, 12, 7, 3, 8, 6]
LAYOUTS = {
    "one batch": lambda chosen: [batch_of(chosen)],
    "batches of one": lambda chosen: [batch_of([text]) for text in chosen],
    "uneven batches": lambda chosen: [batch_of(chosen[:3]), batch_of(chosen[3:5]), batch_of(chosen[5:])],
    "padding-free": lambda chosen: [batch_of(chosen, "padding_free")],
    "another order": lambda chosen: [batch_of(chosen[::-1], "padding_free")],
}


@pytest.fixture
def nets() -> dict[str, Table]:
    return {"student": Table(1), "teacher": Table(2)}


def by_the_book(nets, chosen, *, beta=1.0, skew=0.1):
    """One response at a time, from whole logits."""
    means = {False: [], True: []}
    for text in chosen:
        batch = batch_of([text])
        rows = kept_rows(batch["labels"])
        student, teacher = (rows.select(nets[name].logits()[batch["input_ids"]]) for name in ("student", "teacher"))
        divergence = skew_reverse_kl if text.sampled else skew_kl
        means[text.sampled].append(divergence(student, teacher, skew=skew).mean())
    return (2 - beta) * torch.stack(means[False]).mean() + beta * torch.stack(means[True]).mean()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0, 1.5])
@pytest.mark.parametrize("width", [None, 5])
def test_value_and_gradient_are_those_of_the_formula(beta, width):
    nets, chosen = {"student": Table(1, width=width), "teacher": Table(2, width=width)}, texts(LENGTHS)
    expected = by_the_book(nets, chosen, beta=beta)
    method = DistiLLM2(beta=beta, chunk_rows=4)
    torch.testing.assert_close(total(method, nets, [batch_of(chosen)]), expected)
    for ours, plain in zip(
        gradients(method, nets, [batch_of(chosen)]),
        torch.autograd.grad(expected, nets["student"].parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("curriculum", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_responses_are_batched_does_not_show(nets, layout, curriculum):
    method = DistiLLM2(curriculum=curriculum)
    method.anchors = torch.tensor([0.01, -0.02])
    whole, cut = (gradients(method, nets, LAYOUTS[name](texts(LENGTHS))) for name in ("one batch", layout))
    assert whole[0].abs().max() > 1e-3
    torch.testing.assert_close(cut, whole)


def test_beta_zero_is_twice_skew_kl_on_the_teachers_text(nets):
    chosen = texts(LENGTHS)
    teachers = [text for text in chosen if not text.sampled]
    alone = gradients(DistiLLM2(beta=1.0), nets, [batch_of(teachers)])
    torch.testing.assert_close(gradients(DistiLLM2(beta=0.0), nets, [batch_of(chosen)]), [2 * g for g in alone])


def test_swapping_the_responses_changes_the_loss(nets):
    lengths, flags = LENGTHS[:4], [False, True, False, True]
    ours, swapped = texts(lengths, sampled=flags), texts(lengths, sampled=[not flag for flag in flags])
    assert abs(total(DistiLLM2(), nets, [batch_of(ours)]) - total(DistiLLM2(), nets, [batch_of(swapped)])) > 1e-2


@pytest.mark.parametrize("curriculum", [False, True])
def test_a_student_that_is_the_teacher_has_no_gradient(curriculum):
    nets = {"student": Table(3), "teacher": Table(3)}
    assert total(DistiLLM2(curriculum=curriculum), nets, [batch_of(texts(LENGTHS))]) < 1e-12
    assert gradients(DistiLLM2(curriculum=curriculum), nets, [batch_of(texts(LENGTHS))])[0].abs().max() < 1e-12


def test_a_long_response_weighs_no_more_than_a_short_one(nets):
    """A response that goes round a cycle once or twice has the same mean, so it moves the loss alike."""
    [other], cycle = texts([6], sampled=[False]), [3, 8, 1, 5]
    once, twice = (
        total(DistiLLM2(), nets, [batch_of([other, Text([*cycle * rounds, cycle[0]], prompt=1)])]) for rounds in (1, 2)
    )
    torch.testing.assert_close(once, twice)


def test_a_side_without_responses_gives_a_finite_gradient(nets):
    for flag in (False, True):
        chosen = texts([4, 6], sampled=[flag, flag])
        assert gradients(DistiLLM2(curriculum=True), nets, [batch_of(chosen)])[0].isfinite().all()


def test_plain_data_is_the_teachers_side(nets):
    """Evaluation rows say nothing of samples or sequences."""
    chosen = texts(LENGTHS, sampled=[False] * len(LENGTHS))
    for layout in ("padded", "padding_free"):
        plain, told = (batch_of(chosen, layout, told=told) for told in (False, True))
        assert DistiLLM2().counts(plain) == DistiLLM2().counts(told)
        torch.testing.assert_close(total(DistiLLM2(), nets, [plain]), total(DistiLLM2(), nets, [told]))
        readings = DistiLLM2().evaluate(nets, plain, Step(0, 1)).readings()
        assert {"skew_kl", "skew_reverse_kl", "kl_to_teacher", "cross_entropy"} <= set(readings)


def test_it_counts_the_responses_that_are_trained_on():
    chosen = [*texts([5, 6, 7]), *texts([2, 2], seed=1)]  # two prompts without a response
    for layout in ("padded", "padding_free"):
        counts = {name: int(n) for name, n in DistiLLM2().counts(batch_of(chosen, layout)).items()}
        assert counts == {"tokens": 12, "data_sequences": 2, "student_sequences": 1}


def test_the_curriculum_starts_at_the_base_skew_and_remembers_its_first_gap(nets):
    method, batch = DistiLLM2(curriculum=True), batch_of(texts(LENGTHS))
    torch.testing.assert_close(total(method, nets, [batch]), total(DistiLLM2(), nets, [batch]))
    first = {"data_gap": torch.tensor(0.03), "student_gap": torch.tensor(0.05)}
    method.stepped(Step(1, 10), first)
    method.stepped(Step(2, 10), {name: gap / 3 for name, gap in first.items()})
    copied = DistiLLM2(curriculum=True)
    copied.load_state_dict(copy.deepcopy(method.state_dict()))
    torch.testing.assert_close(copied.anchors, torch.tensor([0.03, 0.05]))


def test_the_curriculums_skew_is_the_published_one(nets):
    """Each response by hand: gap, skew, divergence."""
    method, chosen = DistiLLM2(curriculum=True, skew=0.1), texts(LENGTHS)
    method.anchors = torch.tensor([-0.02, -0.03])
    expected, seen = {False: [], True: []}, set()
    for text in chosen:
        batch = batch_of([text])
        rows = kept_rows(batch["labels"])
        z_s, z_t = (rows.select(nets[name].logits()[batch["input_ids"]]) for name in ("student", "teacher"))
        q, p = (z.log_softmax(-1).gather(-1, rows.labels[:, None]).mean().exp() for z in (z_s, z_t))
        gap = (q - p if text.sampled else p - q).item()
        skew = min(0.1, max(0.01, 1 - 0.9 * method.anchors[int(text.sampled)].item() / (gap + 1e-5)))
        seen.add(round(skew, 4))
        divergence = skew_reverse_kl if text.sampled else skew_kl
        expected[text.sampled].append(divergence(z_s, z_t, skew=skew).mean())
    assert len(seen) > 1
    loss = sum(torch.stack(values).mean() for values in expected.values())
    torch.testing.assert_close(total(method, nets, [batch_of(chosen)]), loss)


def test_a_teacher_of_few_tokens_is_compared_over_buckets_and_cannot_have_a_curriculum(nets):
    def few(batch, rows):
        log_probs, ids = rows.select(nets["teacher"].logits()[batch["input_ids"]]).log_softmax(-1).topk(4)
        return TopK(ids, log_probs.detach())

    batch = batch_of(texts(LENGTHS))
    loss = total(DistiLLM2(), {**nets, "teacher": few}, [batch])
    assert 0 < loss < total(DistiLLM2(), nets, [batch])  # a lower bound
    with pytest.raises(ValueError, match="teacher_cross_entropy"):
        total(DistiLLM2(curriculum=True), {**nets, "teacher": few}, [batch])


def test_the_gradual_weight_is_a_schedule():
    method = DistiLLM2(beta=Linear(start=1.0, end=1.5, until=0.5))
    weights = [[weight for _, _, weight in method.weighted(Step(index, 100))] for index in (0, 25, 50, 100)]
    assert weights == [[1.0, 1.0], [0.75, 1.25], [0.5, 1.5], [0.5, 1.5]]
    assert method.text(Step(0, 100), 0.7) == "both"


@pytest.mark.parametrize(
    "beta", [2.5, {"name": "linear", "start": 1, "end": 3}, {"name": "step", "values": [1, 4], "at": [0.5]}]
)
def test_a_weight_beyond_two_is_refused(beta):
    with pytest.raises(ValidationError, match="at most 2"):
        DistiLLM2Section.model_validate({"name": "distillm2", "beta": beta})


def test_losses_beside_its_own_are_refused():
    with pytest.raises(ValueError, match="leave out forward_kl"):
        DistiLLM2Section().build([ForwardKL()], None)


@torch.no_grad()
def sides(nets, seed):
    """Mean skew KL on the teacher's text, and skew reverse KL on the student's own."""
    found = []
    for name, divergence in (("teacher", skew_kl), ("student", skew_reverse_kl)):
        batch = batch_of(written(nets[name], 300, 8, seed, sampled=name == "student"))
        rows = kept_rows(batch["labels"])
        student, teacher = (nets[side](batch, rows) for side in ("student", "teacher"))
        assert isinstance(student, Dense) and isinstance(teacher, Dense)
        found.append(divergence(student.logits, teacher.logits).mean().item())
    return found


def test_it_lowers_the_divergence_on_the_teachers_text_and_on_the_students_own():
    nets = {"student": Table(1), "teacher": Table(2)}
    before = sides(nets, 99)
    for step in range(60):
        pair = written(nets["teacher"], 16, 8, step, sampled=False) + written(
            nets["student"], 16, 8, step, sampled=True
        )
        descend(DistiLLM2(), nets, [batch_of(pair)], rate=8.0)
    after = sides(nets, 99)
    assert after[0] < 0.3 * before[0] and after[1] < 0.3 * before[1]


@torch.no_grad()
def reverse_on_own_text(nets):
    batch = batch_of(written(nets["student"], 400, 8, 99, sampled=True))
    rows = kept_rows(batch["labels"])
    student, teacher = (rows.select(nets[name].logits()[batch["input_ids"]]) for name in ("student", "teacher"))
    return reverse_kl(student, teacher).mean().item()


def test_at_equal_tokens_its_own_text_is_nearer_to_the_teacher_than_with_skew_kl_alone():
    """A student of rank 4 under a teacher of rank 13, over seeds; half the tokens are the student's, or none."""
    found = {1.0: [], 0.0: []}
    for seed in range(3):
        for beta, ends in found.items():
            nets = {"student": Table(10 + seed, scale=0.3, width=4), "teacher": Table(50 + seed)}
            for step in range(60):
                chosen = written(nets["teacher"], 16 if beta else 32, 8, 1000 * seed + step, sampled=False)
                chosen += written(nets["student"], 16, 8, step, sampled=True) if beta else []
                descend(DistiLLM2(beta=beta), nets, [batch_of(chosen)], rate=1.0)
            ends.append(reverse_on_own_text(nets))
    assert all(both < alone for both, alone in zip(found[1.0], found[0.0], strict=True))
