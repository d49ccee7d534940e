"""Sparse students whose weights are in shards: the masks and the steps of one process, gone on with on other ranks."""

from pathlib import Path

import pytest
import sharded_runs
import torch
from forks import on_ranks
from tiny_models import tiny_model

from kdlm import DistillTrainer
from kdlm.sparsity import SparsitySection

pytestmark = pytest.mark.timeout(600)  # ranks import for most of it

SCRIPT = Path(sharded_runs.__file__)
TOLERANCE = 1e-5
NAMES = tuple(sharded_runs.SPARSE)


def check(folder: Path, expected: Path, said: str) -> None:
    """Compare losses, weights, and which of them are zero, of every sparse run in a folder."""
    for name in NAMES:
        here, there = sharded_runs.read(folder / name), sharded_runs.read(expected / name)
        curve, weights = sharded_runs.differences(here, there)
        assert curve < TOLERANCE and weights < TOLERANCE, f"{said}, {name}: {curve:.1e} {weights:.1e}"
        zeros = {key: weight == 0 for key, weight in there[1].items()}
        assert all(torch.equal(weight == 0, zeros[key]) for key, weight in here[1].items()), f"{said}, {name}"
        layers = [zero for key, zero in zeros.items() if key.endswith("proj.weight")]
        share = sum(int(zero.sum()) for zero in layers) / sum(zero.numel() for zero in layers)
        assert share == pytest.approx({"sparse, 2:4": 0.5, "sparse, wanda": 0.6}.get(name, 0.7), abs=0.05)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    on_ranks(1, SCRIPT, folder, "one process", "save", "3", *NAMES, seconds=300)
    return folder


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        ("fsdp2", 2),
        pytest.param("fsdp2", 4, marks=pytest.mark.slow),
        pytest.param("zero1", 2, marks=pytest.mark.slow),
        pytest.param("zero2", 2, marks=pytest.mark.slow),
    ],
)
def test_a_student_is_pruned_as_by_one_process(one_process: Path, tmp_path: Path, strategy: str, ranks: int) -> None:
    """Ranks are asserted to hold shares, of the masks too; moments are zero where weights went."""
    on_ranks(ranks, SCRIPT, tmp_path, strategy, *NAMES, seconds=300)
    check(tmp_path, one_process, f"{strategy} on {ranks}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "ranks", "resumed"),
    [
        ("fsdp2, sharded checkpoints", 2, {1: "one process", 4: "fsdp2, sharded checkpoints"}),
        ("fsdp2", 2, {4: "fsdp2"}),
        ("zero2", 2, {4: "zero2"}),
        ("one process", 1, {2: "fsdp2"}),
    ],
)
def test_a_schedule_goes_on_on_any_number_of_ranks(
    one_process: Path, tmp_path: Path, saved: str, ranks: int, resumed: dict[int, str]
) -> None:
    """Saved after three of six steps, with more to prune in the fourth."""
    if saved != "one process":
        on_ranks(ranks, SCRIPT, tmp_path, saved, "save", "3", *NAMES, seconds=300)
    source = one_process if saved == "one process" else tmp_path
    for count, strategy in resumed.items():
        (again := tmp_path / f"on-{count}").mkdir()
        on_ranks(count, SCRIPT, again, strategy, "resume", str(source), "3", *NAMES, seconds=300)
        check(again, one_process, f"{saved} on {ranks}, {strategy} on {count}")


def test_zero3_is_refused(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdlm.sparsity.masking.cuts_weights", lambda accelerator: True)
    run = DistillTrainer(tiny_model(1), tiny_model(2), arguments())
    with pytest.raises(ValueError, match="sparsity: masks are of rows of a weight, and ZeRO-3 cuts weights anywhere"):
        run.sparsify(SparsitySection(share=0.5))
