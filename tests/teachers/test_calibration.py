"""Re-calibration of top-k signals (FIRST): ranks and masses stay, the identity is one, the best value is found."""

from itertools import pairwise

import pytest
import torch

from kdlm.signal import TopK
from kdlm.teachers.calibration import (
    LabelSmoothing,
    Temperature,
    expected_calibration_error,
    smoothed,
    tempered,
)


def kept(rows: int = 50, k: int = 5, sharpness: float = 2.0) -> torch.Tensor:
    logits = torch.randn(rows, 40, generator=torch.Generator().manual_seed(2)) * sharpness
    return logits.log_softmax(-1).topk(k).values[:, torch.randperm(k)]


@pytest.mark.parametrize(("function", "values"), [(tempered, (0.5, 1.5, 4.0)), (smoothed, (0.05, 0.3, 0.9))])
def test_ranks_and_the_mass_of_the_kept_tokens_stay(function, values) -> None:
    log_p = kept().double()
    for value in values:
        found = function(log_p, value)
        torch.testing.assert_close(found.exp().sum(-1), log_p.exp().sum(-1))
        ordered = found.gather(-1, log_p.argsort(-1, descending=True))
        assert (ordered.diff(dim=-1) <= 1e-12).all()


@pytest.mark.parametrize(("function", "identity"), [(tempered, 1.0), (smoothed, 0.0)])
def test_the_identity_changes_nothing(function, identity: float) -> None:
    log_p = kept()
    torch.testing.assert_close(function(log_p, identity), log_p)


def test_a_higher_temperature_and_more_smoothing_make_the_first_token_less_sure() -> None:
    log_p = kept()
    firsts = [tempered(log_p, c).amax(-1) for c in (0.5, 1.0, 2.0, 8.0)]
    assert all((b < a).all() for a, b in pairwise(firsts))
    firsts = [smoothed(log_p, d).amax(-1) for d in (0.0, 0.02, 0.1)]
    assert all((b <= a).all() for a, b in pairwise(firsts))


def test_one_kept_token_cannot_be_recalibrated() -> None:
    log_p = kept(k=1)
    torch.testing.assert_close(tempered(log_p, 3.0), log_p)
    torch.testing.assert_close(smoothed(log_p, 0.1), log_p)


def test_the_calibration_error_is_that_of_its_definition() -> None:
    confidence, hit = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.1, 0.1]), torch.tensor([1, 1, 1, 0, 0, 0]).bool()
    assert expected_calibration_error(confidence, hit) == pytest.approx((4 * 0.2 + 2 * 0.1) / 6)
    assert expected_calibration_error(torch.ones(0), torch.ones(0).bool()) == 0.0


def test_the_temperature_that_an_overconfident_teacher_needs_is_found() -> None:
    """Labels are drawn from p; the teacher says p^(1/0.5), which a temperature of 2 undoes."""
    generator = torch.Generator().manual_seed(0)
    true = (torch.randn(40_000, 4, generator=generator) * 1.2).log_softmax(-1)
    ids = torch.arange(4).expand(len(true), 4)
    labels = torch.multinomial(true.exp(), 1, generator=generator).squeeze(-1)
    sure = TopK(ids, (true * 2).log_softmax(-1))
    value, errors = Temperature(value=None).chosen(
        [(TopK(sure.ids[:9], sure.log_probs[:9]), labels[:9]), (sure, labels)]
    )
    assert value == pytest.approx(2.0, rel=0.1) and errors[value] < errors[1.0] / 3
    calm, _ = Temperature(value=None).chosen([(TopK(ids, true), labels)])
    assert calm == pytest.approx(1.0, rel=0.1)


def test_smoothing_is_chosen_where_it_helps_and_left_alone_where_it_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(20_000, 4)
    labels = torch.multinomial(p, 1, generator=generator).squeeze(-1)
    ids = torch.arange(4).expand(len(p), 4)
    sure = torch.tensor([0.85, 0.05, 0.05, 0.05]).log().expand(20_000, 4)
    value, _ = LabelSmoothing(value=None).chosen([(TopK(ids, sure), labels)])
    assert value == pytest.approx(0.15, abs=0.02)
    assert LabelSmoothing(value=None).chosen([(TopK(ids, p.log()), labels)])[0] == pytest.approx(0.0, abs=0.02)


def test_without_held_out_rows_there_is_nothing_to_choose_on() -> None:
    with pytest.raises(ValueError, match="no evaluation rows to choose its value on; set `value`"):
        Temperature(value=None).chosen([])
