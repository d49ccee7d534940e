"""Rows that a method makes before its first step: once, the same again after a kill, and put in place of the given."""

from pathlib import Path

import pytest
import torch
from forks import on_ranks
from torch import nn

from kdlm import DistillTrainer, preparation
from kdlm.data import TensorRows
from kdlm.methods import Method, Preparation, Step, Term, Terms

ROWS = TensorRows({"samples": torch.linspace(-1, 1, 8)[:, None], "index": torch.arange(8)})


class Drawn(Method):
    """Trains on sums of the given rows, the student's first answers and random numbers."""

    def __init__(self, factor: float = 1.0):
        self.factor, self.seen = factor, []

    def counts(self, batch):
        return {"tokens": torch.tensor(len(batch["index"]))}

    def prepare(self, context: Preparation) -> TensorRows:
        self.seen.append("made")
        assert not any(net.training for net in context.nets.values())
        batch = context.batch(i % len(context.rows) for i in range(12))
        with torch.no_grad():
            answers = context.nets["student"](batch["samples"])
        made = batch["samples"] + answers + self.factor * torch.randn(12, 1)
        return TensorRows({"made": made, "index": torch.arange(12)})

    def losses(self, nets, batch, active, step: Step) -> Terms:
        return Terms({"square": Term((nets["student"](batch["made"]) - 1).square().sum())})


def trainer(arguments, method: Method, **options) -> DistillTrainer:
    torch.manual_seed(options.get("seed", 3))
    return DistillTrainer(nn.Linear(1, 1), None, arguments(**options), method=method, train_dataset=ROWS)


def made_of(run: DistillTrainer) -> torch.Tensor:
    run.prepare()
    return run.train_dataset.columns["made"]


def test_the_run_trains_on_the_made_rows_and_makes_them_once(arguments) -> None:
    run = trainer(arguments, Drawn(), max_steps=2)
    run.train()
    assert isinstance(run.train_dataset, TensorRows) and len(run.train_dataset) == 12
    run.train()
    assert len(run.method.seen) == 1


def test_a_second_run_in_the_folder_reads_what_the_first_made(arguments) -> None:
    first, second = (trainer(arguments, Drawn()) for _ in range(2))
    assert torch.equal(made_of(first), made_of(second))
    assert second.method.seen == []


@pytest.mark.parametrize("other", [{"method": Drawn(2.0)}, {"seed": 4}], ids=["options", "seed and weights"])
def test_rows_of_another_run_are_made_anew(arguments, other: dict) -> None:
    before = made_of(trainer(arguments, Drawn()))
    run = trainer(arguments, other.pop("method", None) or Drawn(), **other)
    assert not torch.equal(made_of(run), before) and len(run.method.seen) == 1


def test_a_half_written_folder_is_made_again_and_is_the_same(arguments, tmp_path: Path) -> None:
    whole = made_of(trainer(arguments, Drawn()))
    folder = tmp_path / "run" / preparation.FOLDER
    (folder / "manifest.json").unlink()
    run = trainer(arguments, Drawn())
    assert torch.equal(made_of(run), whole) and len(run.method.seen) == 1
    content = bytearray((folder / preparation.ROWS).read_bytes())
    content[-3] ^= 1
    (folder / preparation.ROWS).write_bytes(content)
    run = trainer(arguments, Drawn())
    assert torch.equal(made_of(run), whole) and len(run.method.seen) == 1


def test_a_kill_while_the_rows_are_written_leaves_none(arguments, tmp_path: Path, monkeypatch) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation.checkpoints, "seal", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer(arguments, Drawn()).prepare()
    assert not (tmp_path / "run" / preparation.FOLDER).exists()
    assert len(made_of(trainer(arguments, Drawn()))) == 12


def test_making_rows_leaves_the_runs_own_random_numbers_alone(arguments) -> None:
    run = trainer(arguments, Drawn())
    torch.manual_seed(9)
    run.prepare()
    drawn = torch.randn(3)
    torch.manual_seed(9)
    assert torch.equal(drawn, torch.randn(3))


def test_a_run_resumed_on_made_rows_ends_as_an_unbroken_one(arguments) -> None:
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3}
    whole = trainer(arguments, Drawn(), **steps)
    whole.train()
    resumed = trainer(arguments, Drawn(), **steps)
    resumed.train(resume_from_checkpoint=str(Path(str(resumed.args.output_dir)) / "checkpoint-2"))
    assert resumed.method.seen == []
    assert torch.equal(whole.student.weight, resumed.student.weight)


def test_two_ranks_train_on_the_same_rows_made_once(tmp_path: Path) -> None:
    on_ranks(2, Path(__file__).with_name("two_ranks_prepared.py"), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("made-*")) == ["made-0"]
