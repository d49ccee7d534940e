"""GDSD: its gradient where nothing has moved, its masks, its clamp, and what it does with rewards."""

import math
from typing import Any

import pytest
import torch
from tiny_masked import MASK, VOCAB, texts, tiny_masked

from kdlm.data import Collator
from kdlm.losses import ForwardKL
from kdlm.methods import GDSD, Step
from kdlm.methods.masked.gdsd import GDSDSection
from kdlm.methods.masked.masking import Texts, masked
from kdlm.models import Predictor
from kdlm.roles import SnapshotOf
from kdlm.signal import Dense

STUDENT = frozenset({"student"})
REWARDS = [1.0, 0.0, 0.5, 0.25, 0.25, 1.0]


class Table:
    """A model that gives every place of every text a law of its own, whatever is hidden."""

    mask_id = MASK

    def __init__(self, logits: torch.Tensor):
        self.logits = logits

    def __call__(self, batch: Any, rows: Any) -> Dense:
        return Dense(self.logits.flatten(0, 1)[rows.index])


def completions(lengths: list[int], rewards: list[float]) -> dict[str, torch.Tensor]:
    """Pairs of completions of one prompt each."""
    rows = [dict(row, index=number // 2) for number, row in enumerate(texts(lengths))]
    return Collator(0)(rows) | {"reward": torch.tensor(rewards)}


def total(method: GDSD, nets: dict[str, Any], batch: dict[str, torch.Tensor], name: str = "", step: int = 0) -> Any:
    """Return the loss, or one of its terms without its weight, and the sums of the metrics."""
    counts, value, metrics = method.counts(batch), torch.zeros((), dtype=torch.float64), dict[str, float]()
    for terms in method.losses(nets, batch, STUDENT, Step(step, 100, seed=3)):
        for key, term in terms.terms.items():
            if name in ("", key):
                value = value + (1 if name else term.weight) * term.sum / counts[term.unit]
        for key, (metric, unit) in terms.metrics.items():
            metrics[key] = metrics.get(key, 0.0) + (metric / counts[unit]).item()
    return value, metrics


@pytest.mark.parametrize("complementary", [True, False])
def test_where_nothing_has_moved_the_gradient_is_that_of_the_scores_by_their_advantages(complementary: bool) -> None:
    model, batch = tiny_masked(), completions([6, 8, 5, 9, 7, 7], REWARDS)
    method = GDSD(psi=3.0, masks=4, complementary=complementary)
    nets = {"student": Predictor(model), "old": Predictor(tiny_masked()), "reference": Predictor(tiny_masked())}
    total(method, nets, batch)[0].backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    advantages = torch.tensor([1.0, -1.0, 0.25, -0.25, -0.75, 0.75])  # the reward less the other's
    whole, count, expected = Texts.of(batch), 0, torch.zeros((), dtype=torch.float64)
    for hidden in method.drawn(whole, Step(0, 100, seed=3)):
        seen = masked(whole, hidden, MASK)
        logs = model(**seen.batch).logits.flatten(0, 1)[seen.rows.index].log_softmax(-1)
        scores = seen.by_text(logs.gather(-1, seen.rows.labels[:, None])[:, 0])
        expected = expected - (2 * 3.0 * advantages * scores / hidden.sum(-1).clamp(min=1)).sum()
        count += int((hidden.sum(-1) > 0).sum())
    (expected / count).backward()
    torch.testing.assert_close(ours, [p.grad for p in model.parameters()], rtol=1e-8, atol=1e-10)
    assert max(grad.abs().max() for grad in ours) > 1e-3


def test_equal_rewards_in_a_group_leave_the_pull_to_the_reference_alone() -> None:
    batch = completions([6, 8, 5, 9], [0.5, 0.5, 2.0, 2.0])
    student = Predictor(tiny_masked())
    value, _ = total(
        GDSD(inner_steps=1, kl_weight=0.1), {"student": student, "reference": Predictor(tiny_masked(1))}, batch
    )
    pull, _ = total(
        GDSD(inner_steps=1), {"student": student, "reference": Predictor(tiny_masked(1))}, batch, "reference_k2"
    )
    assert value.item() == pytest.approx(0.1 * pull.item(), rel=1e-12) and pull > 0
    alone, _ = total(GDSD(inner_steps=1), {"student": student, "reference": Predictor(tiny_masked())}, batch)
    alone.backward()
    assert alone.abs() < 1e-12 and max(p.grad.abs().max() for p in student.module.parameters()) < 1e-12


def test_a_pair_of_masks_hides_every_token_once() -> None:
    batch = completions([6, 8, 3, 9], REWARDS[:4])
    whole, method = Texts.of(batch), GDSD(masks=6)
    for step in range(10):
        masks = method.drawn(whole, Step(step, 100, seed=3))
        assert len(masks) == 6
        for first, second in zip(masks[::2], masks[1::2], strict=True):
            assert not (first & second).any() and torch.equal(first | second, whole.trained)
            assert (first.sum(-1) > 0).all() and ((second.sum(-1) > 0) | (whole.sizes == 1)).all()
        assert sum(int((hidden.sum(-1) > 0).sum()) for hidden in masks) == method.counts(batch)["masks"] == 21


def test_the_same_masks_are_replayed_for_every_network_and_other_ones_drawn_at_every_step() -> None:
    seen: dict[str, list[Any]] = {"student": [], "old": [], "reference": []}
    table = torch.zeros(4, 9, VOCAB, dtype=torch.float64)

    def noted(name: str) -> Any:
        net = Table(table)

        def ask(batch: Any, rows: Any) -> Dense:
            seen[name].append(batch["input_ids"])
            return net(batch, rows)

        ask.mask_id = MASK  # pyright: ignore[reportFunctionMemberAccess]
        return ask

    batch, nets = completions([6, 8, 3, 9], REWARDS[:4]), {name: noted(name) for name in seen}
    for step in (0, 0, 1):
        total(GDSD(), nets, batch, step=step)
    for name in ("old", "reference"):
        assert all(torch.equal(*pair) for pair in zip(seen["student"], seen[name], strict=True))
    first, again, other = seen["student"][:4], seen["student"][4:8], seen["student"][8:]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(first, other, strict=True))


def test_outside_of_the_band_a_completion_has_no_gradient_and_the_active_share_says_so() -> None:
    batch = completions([6, 6, 6, 6], [1.0, 0.0, 1.0, 0.0])
    old = torch.zeros(4, 6, VOCAB, dtype=torch.float64)
    logits = old.clone()
    logits[0].scatter_(-1, batch["input_ids"][0, :, None], 1.0)  # only the first has moved
    logits.requires_grad_()
    method = GDSD(kl_weight=0.0, clip=4e-4)
    value, metrics = total(method, {"student": Table(logits), "old": Table(old)}, batch)
    value.backward()
    assert metrics["active"] == pytest.approx(0.75)
    assert not logits.grad[0].any() and all(logits.grad[place].any() for place in (1, 2, 3))
    assert metrics["score_gap"] > 0.1


def test_with_one_step_for_each_generation_nothing_is_clamped_and_no_copy_is_kept() -> None:
    assert GDSD(inner_steps=1).roles.keys() == {"student", "reference"}
    assert GDSD(kl_weight=0.0).roles.keys() == {"student", "old"}
    roles = GDSD(inner_steps=4, reference_every=6).roles
    taken = {
        name: [step for step in range(1, 13) if role.at(step)]
        for name, role in roles.items()
        if isinstance(role, SnapshotOf) and role.at
    }
    assert taken == {"old": [4, 8, 12], "reference": [6, 12]}
    logits = torch.randn(2, 6, VOCAB, dtype=torch.float64, requires_grad=True)
    _, metrics = total(GDSD(inner_steps=1, kl_weight=0.0), {"student": Table(logits)}, completions([6, 6], [1.0, 0.0]))
    assert metrics["active"] == pytest.approx(1.0) and metrics["score_gap"] == 0


def test_the_gradient_is_that_of_the_loss() -> None:
    batch = completions([5, 4], [1.0, 0.0])
    old, reference = (torch.randn(2, 5, VOCAB, dtype=torch.float64) for _ in range(2))
    method = GDSD(clip=0.5, kl_weight=0.3, masks=2, impl="torch")

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return total(method, {"student": Table(logits), "old": Table(old), "reference": Table(reference)}, batch)[0]

    start = (old + 0.01 * torch.randn_like(old)).requires_grad_()
    assert torch.autograd.gradcheck(loss, start, atol=1e-6, rtol=1e-4)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 are not pairs: use an even number"):
        GDSDSection(masks=3)
    assert GDSDSection(masks=3, complementary=False).build([], None).masks == 3
    with pytest.raises(ValueError, match="gdsd brings its own"):
        GDSDSection().build([ForwardKL()], None)
    assert GDSD(clip=0.1).band == pytest.approx((math.log(0.9), math.log(1.1)))
