"""Laws of the ways to keep a matrix: bytes, errors, order, and what comes back."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlm.packs.allocation import Survey, allocate, survey
from kdlm.packs.compression import Dense, LowRank, Pruned, as_matrix
from kdlm.packs.quantization import LOSS, bytes_of_codes, count_of_steps, dequantize, quantize
from kdlm.packs.tensor_files import size_of

BITS = (32, 16, 8, 4, 3, 2)


def decaying(rows: int, columns: int, decay: float = 0.9) -> torch.Tensor:
    """A matrix whose singular values fall by a factor, about."""
    torch.manual_seed(rows)
    return torch.randn(rows, columns) * decay ** torch.arange(columns)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), length=st.integers(1, 300), bits=st.sampled_from(BITS), scale=st.floats(1e-8, 1e4))
def test_rounding_takes_the_bytes_it_says_and_rounding_again_changes_nothing(rows, length, bits, scale):
    torch.manual_seed(length)
    codes, steps = quantize(scale * torch.randn(rows, length), bits)
    assert (len(codes), len(steps)) == (bytes_of_codes(rows, length, bits), count_of_steps(rows, length, bits))
    back = dequantize(codes, steps, rows, length, bits)
    assert back.shape == (rows, length)
    assert torch.isfinite(back).all()


@pytest.mark.parametrize("bits", BITS)
def test_what_rounding_loses_of_normal_numbers_is_what_the_allocation_counts_on(bits):
    values = torch.randn(64, 640)
    lost = (dequantize(*quantize(values, bits), 64, 640, bits) - values).square().sum() / values.square().sum()
    assert LOSS[bits] / 4 <= lost <= 4 * LOSS[bits] + 1e-30


@pytest.mark.parametrize("bits", BITS)
def test_groups_of_zeros_stay_zeros_whatever_is_in_the_others(bits):
    values = torch.zeros(2, 300)
    values[1, 0] = 5.0
    back = dequantize(*quantize(values, bits), 2, 300, bits)
    assert not back[0].any()
    assert not back[1, 128:].any()
    assert 0 < back[1, 0] <= 5.0


@pytest.mark.parametrize("shape", [(37, 20), (20, 37), (1, 9), (300, 3)])
def test_the_error_of_a_rank_is_the_norm_of_the_singular_values_cut_off_and_falls_with_the_rank(shape):
    matrix = decaying(*shape)
    values = torch.linalg.svdvals(matrix.double())
    errors = []
    for rank in range(1, min(shape) + 1):
        factors = LowRank(bands=((32, rank),))
        errors.append((matrix - factors.decode(factors.encode(matrix), shape)).norm().item())
        assert errors[-1] == pytest.approx(values[rank:].norm().item(), rel=1e-4, abs=1e-6 * values[0].item())
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] < 1e-6 * values[0]


@pytest.mark.parametrize(
    "how",
    [*(Dense(bits=bits) for bits in BITS), Pruned(kept=50, bits=4), LowRank(bands=((8, 2), (4, 3), (2, 6)))],
    ids=repr,
)
@pytest.mark.parametrize("shape", [(33, 17), (17, 33)])
def test_a_way_takes_the_bytes_and_makes_the_tensors_that_it_says(how, shape):
    coded = how.encode(decaying(*shape))
    assert {name: tuple(tensor.shape) for name, tensor in coded.items()} == {
        name: kind[1] for name, kind in how.kinds(shape).items()
    }
    assert sum(tensor.nbytes for tensor in coded.values()) == how.bytes(shape)
    assert how.bytes(shape) == sum(size_of(kind) for kind in how.kinds(shape).values())
    assert how.decode(coded, shape).shape == shape


def test_a_transposed_matrix_comes_back_transposed():
    how, matrix = LowRank(bands=((8, 3), (2, 5))), decaying(40, 24)
    upright, lying = (how.decode(how.encode(each), tuple(each.shape)) for each in (matrix, matrix.T))
    torch.testing.assert_close(upright, lying.T, rtol=1e-4, atol=1e-5)


def test_pruning_keeps_the_largest_entries_and_nothing_else():
    matrix = decaying(20, 30)
    how = Pruned(kept=60, bits=32)
    back = how.decode(how.encode(matrix), (20, 30))
    least = matrix.abs().flatten().sort().values[-60]
    torch.testing.assert_close(back, torch.where(matrix.abs() >= least, matrix, 0.0), rtol=0, atol=0)


def test_leading_directions_get_more_bits_and_more_bits_lose_less():
    matrix = decaying(96, 64)
    surveyed = survey(matrix, vector=False)
    budgets = (700, 1500, 3000, 6000)
    errors = []
    for budget in budgets:
        choice = allocate({"a": surveyed}, budget)["a"]
        assert choice.bytes <= budget
        if isinstance(choice.how, LowRank):
            assert [bits for bits, _ in choice.how.bands] == sorted((b for b, _ in choice.how.bands), reverse=True)
        assert choice.how is not None
        lost = matrix - choice.how.decode(choice.how.encode(matrix), (96, 64))
        errors.append(lost.norm().item() / matrix.norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


def test_an_allocation_loses_no_more_than_an_equal_split_of_the_bytes():
    matrices = {"large": 10 * decaying(64, 48), "small": decaying(64, 48), "flat": torch.randn(64, 48)}
    surveys = {name: survey(matrix, vector=False) for name, matrix in matrices.items()}
    together = sum(choice.error for choice in allocate(surveys, 3000).values())
    apart = sum(allocate({name: each}, 1000)[name].error for name, each in surveys.items())
    assert together <= apart


def test_an_allocation_is_the_best_there_is_where_that_can_be_tried():
    surveys = {}
    for name, scale in (("a", 3.0), ("b", 1.0)):
        whole = survey(scale * decaying(24, 16), vector=False)
        surveys[name] = Survey(whole.shape, whole.energy, np.zeros(0), whole.choices)
    for budget in (300, 600, 900):
        found = sum(choice.error for choice in allocate(surveys, budget).values())
        pairs = ((a, b) for a in surveys["a"].choices for b in surveys["b"].choices if a.bytes + b.bytes <= budget)
        best = min(a.error + b.error for a, b in pairs)
        energy = sum(each.energy for each in surveys.values())
        assert best <= found * (1 + 1e-9)
        assert found <= best + 0.05 * energy  # prices reach the convex hull, and what is left over is spent


def test_sparse_deltas_are_pruned_and_vectors_are_kept_at_any_price():
    sparse = torch.zeros(64, 64)
    sparse.view(-1)[torch.randperm(64 * 64)[:200]] = torch.randn(200)
    surveys = {"sparse": survey(sparse, vector=False), "norm": survey(torch.randn(1, 64) * 1e-9, vector=True)}
    found = allocate(surveys, 64 * 64 // 8 + 128 + 200)
    assert isinstance(found["sparse"].how, Pruned)
    assert found["norm"].how == Dense(bits=16)
    with pytest.raises(ValueError, match="raise --share"):
        allocate(surveys, 100)


@pytest.mark.parametrize(
    ("shape", "matrix"), [((7,), (1, 7)), ((), (1, 1)), ((4, 5, 6), (20, 6)), ((4, 5, 3, 3), (4, 45))]
)
def test_a_delta_of_any_shape_is_a_matrix(shape, matrix):
    assert as_matrix(torch.zeros(shape)).shape == matrix
