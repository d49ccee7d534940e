import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlm.quality import FrechetStats, frechet_distance
from kdlm.quality.frechet import _from_rows


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def exact_moments(n: int, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Rows whose sample mean and covariance are these to the last digit."""
    rows = draws(n, len(mean))
    rows = rows - rows.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(rows.T.cov()), rows.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_two_gaussians_that_share_their_axes_are_at_the_closed_form():
    """|m_a - m_b|^2 plus the squared differences of the standard deviations along the axes."""
    turn = torch.linalg.qr(draws(5, 5))[0]
    spread_a, spread_b = torch.rand(5).double() + 0.1, torch.rand(5).double() + 0.1
    mean_a, mean_b = draws(5), draws(5)
    a = exact_moments(40, mean_a, turn @ torch.diag(spread_a**2) @ turn.T)
    b = exact_moments(31, mean_b, turn @ torch.diag(spread_b**2) @ turn.T)
    expected = (mean_a - mean_b).square().sum() + (spread_a - spread_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_two_gaussians_of_other_axes_are_at_the_trace_of_the_matrix_square_root():
    a, b = draws(50, 4) @ draws(4, 4), draws(50, 4) @ draws(4, 4)
    product = a.T.cov() @ b.T.cov()
    overlap = torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 30), m=st.integers(2, 30), width=st.integers(1, 25))
def test_from_rows_or_from_covariances_it_is_one_number(n, m, width):
    a, b = draws(n, width), draws(m, width) * 2 + 1
    stats = [FrechetStats(width).add(rows) for rows in (a, b)]
    expected = frechet_distance(*stats)
    assert _from_rows(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, stats[0]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(50, 3), (5, 7), (4, 60), (3, 3, 8, 8)])
def test_a_set_is_at_zero_from_itself_in_any_order(shape):
    a = draws(*shape)
    scale = a.square().sum().item()
    assert frechet_distance(a, a) <= 1e-7 * scale
    assert frechet_distance(a, a.flip(0)) <= 1e-7 * scale


def test_neither_order_nor_batches_move_it():
    a, b = draws(37, 6), draws(37, 6) + 1
    shuffled = a[torch.randperm(37)]
    assert frechet_distance(shuffled, b) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    gathered = FrechetStats(6)
    for part in a.split(5):
        gathered.add(part.float())
    assert frechet_distance(gathered, b) == pytest.approx(frechet_distance(a, b), rel=1e-5)


def test_images_are_read_as_their_pixels():
    a, b = torch.rand(9, 3, 4, 4), torch.rand(9, 3, 4, 4)
    assert frechet_distance(a, b) == frechet_distance(a.flatten(1), b.flatten(1))


def test_samples_that_vary_too_little_are_seen():
    real = draws(200, 4)
    assert frechet_distance(real * 0.5, real) == pytest.approx(0.25 * 4, rel=0.2)


def test_the_statistics_of_a_reference_survive_the_disk(tmp_path):
    stats = FrechetStats(4).add(draws(20, 4))
    stats.save(tmp_path / "new" / "reference.safetensors")
    back = FrechetStats.load(tmp_path / "new" / "reference.safetensors")
    assert all(torch.equal(getattr(back, part), getattr(stats, part)) for part in ("count", "total", "outer"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["reference.safetensors"]


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: expected count, total and outer"):
        FrechetStats.load(tmp_path / "model.safetensors")


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_has_no_distance_is_refused():
    with pytest.raises(ValueError, match="2 or more samples"):
        frechet_distance(draws(1, 3), draws(5, 3))
    with pytest.raises(ValueError, match="needs two rows or more, got 1"):
        frechet_distance(FrechetStats(3).add(draws(1, 3)), draws(5, 3))
    with pytest.raises(ValueError, match="one width, got 3 and 4"):
        frechet_distance(draws(5, 3), draws(5, 4))
    with pytest.raises(ValueError, match="width 3 are gathered here, got 4"):
        FrechetStats(3).add(draws(5, 4))
    spoilt = draws(5, 3)
    spoilt[1, 2] = torch.nan
    spoilt[3] = torch.inf
    with pytest.raises(ValueError, match="the second set: 2 of 5 samples hold values that are not finite"):
        frechet_distance(draws(5, 3), spoilt)
