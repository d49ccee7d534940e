"""Runs whose rows a sampler draws: what they are trained on, on how many steps, and after a kill."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import on_ranks
from safetensors.torch import load_file
from tiny_models import rows, tiny_model

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.samplers import DomainGaps, FixedSubset, RepeatedSubsets

DDK = DomainGaps(every=3, held_out=2)
NAMES = {7: "near", 9: "far"}


def of_domains(count: int = 24) -> list[dict[str, Any]]:
    """Rows of two domains, the second a third of them; each says which it is."""
    made = rows([6 + place % 5 for place in range(count)])
    return [{**row, "index": n, "domain": 9 if n % 3 == 0 else 7} for n, row in enumerate(made)]


def trainer(args: Any, section: Any, seen: list[int] | None = None, **options: Any) -> DistillTrainer:
    collator = Collator(0)

    def collate(batch: Any) -> Any:
        if seen is not None:
            seen.extend(int(row["index"]) for row in batch)
        return collator(batch)

    teacher = tiny_model(2, hidden=24)
    made = DistillTrainer(tiny_model(1), teacher, args, train_dataset=of_domains(), data_collator=collate, **options)
    made.draw(section, names=NAMES)
    return made


def logged(made: DistillTrainer, name: str) -> list[float]:
    return [line[name] for line in made.state.log_history if name in line]


def weights(made: DistillTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.student.state_dict().items()}


def test_repeated_subsets_set_the_number_of_updates_and_with_it_the_schedule(arguments):
    seen: list[int] = []
    made = trainer(
        arguments(max_steps=-1, num_train_epochs=4, lr_scheduler_type="linear"), RepeatedSubsets(fraction=0.5), seen
    )
    made.train()
    assert made.state.global_step == made.state.max_steps == 4 * 2  # 12 rows an epoch, 8 a step
    assert made.lr_scheduler.get_last_lr()[0] == 0.0
    assert sorted(seen) == sorted([*range(24)] * 2), "two passes over all rows in four halves"
    assert sorted(seen[:24]) == [*range(24)]


def test_a_fixed_subset_is_all_that_a_run_sees(arguments):
    seen: list[int] = []
    made = trainer(arguments(max_steps=6), FixedSubset(fraction=0.25, balance="domain"), seen)
    made.train()
    assert len(set(seen)) == 6 and sum(one % 3 == 0 for one in set(seen)) == 2, "a quarter of each domain"


def test_ddk_logs_shares_that_follow_its_gaps_and_counts_every_sample(arguments):
    made = trainer(arguments(max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2), DDK)
    made.train()
    shares = {name: logged(made, f"share/{name}") for name in NAMES.values()}
    gaps = {name: logged(made, f"gap/{name}") for name in NAMES.values()}
    assert len(shares["near"]) == 3  # before the first step, after 3 and 6
    for near, far in zip(shares["near"], shares["far"], strict=True):
        assert near + far == pytest.approx(1) and min(near, far) >= 0.25
    assert (shares["far"][0] > 0.5) == (gaps["far"][0] > gaps["near"][0])
    samples = [logged(made, f"samples/{name}") for name in NAMES.values()]
    assert [sum(counts) for counts in zip(*samples, strict=True)] == [0, 12, 24, 32]
    assert logged(made, "passes/far")[-1] == logged(made, "samples/far")[2] / 6 > 1, "it began again"


def test_rows_that_are_measured_are_never_trained_on(arguments):
    seen: list[int] = []
    made = trainer(arguments(max_steps=9, per_device_train_batch_size=8), DDK, seen)
    made.get_train_dataloader()
    measured = {int(place) for places in made.order.slices.values() for place in places}
    made.measured_gaps()
    seen.clear()
    made.measured_gaps = lambda: np.ones(2)
    made.train()
    assert len(seen) == 72 and not measured & set(seen)
    assert set(seen) | measured == {*range(24)}


@pytest.mark.parametrize("at", [2, 3, 5])
@pytest.mark.parametrize(
    "section", [DDK, RepeatedSubsets(fraction=0.4), FixedSubset(fraction=0.6)], ids=lambda s: s.name
)
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_the_unbroken_one(arguments, section, at):
    options = {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = trainer(arguments(**options), section)
    whole.train()
    saves = {**options, "save_strategy": "steps", "save_steps": at}
    broken = trainer(arguments(**saves), section)
    broken.train()
    again = trainer(arguments(**saves), section)
    again.train(resume_from_checkpoint=str(Path(again.args.output_dir) / f"checkpoint-{at}"))
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    for name in ("share/far", "samples/far", "gap/near") if section is DDK else ():
        assert logged(whole, name) == logged(again, name)


def test_a_checkpoint_of_other_domains_is_refused(arguments):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer(arguments(**options), DDK).train()
    other = trainer(arguments(**{**options, "max_steps": 5}), DDK)
    other.train_dataset = [{**row, "domain": row["domain"] + 1} for row in of_domains()]
    with pytest.raises(ValueError, match="other domains"):
        other.train(resume_from_checkpoint=str(Path(other.args.output_dir) / "checkpoint-3"))


@pytest.mark.parametrize(
    ("said", "changes"),
    [
        ("training.max_steps", {"max_steps": -1, "num_train_epochs": 2}),
        ("train_sampling_strategy", {"train_sampling_strategy": "group_by_length"}),
    ],
)
def test_what_ddk_cannot_work_with_is_refused_by_its_key(arguments, said, changes):
    with pytest.raises(ValueError, match=said):
        trainer(arguments(**changes), DDK)


def test_two_ranks_train_as_one_does_with_the_same_shares(tmp_path):
    script = Path(__file__).parent / "two_ranks_sampler.py"
    one, two = tmp_path / "one", tmp_path / "two"
    for count, folder in ((1, one), (2, two)):
        folder.mkdir()
        on_ranks(count, script, folder)
    alone, shared = (load_file(folder / "weights.safetensors") for folder in (one, two))
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-9, atol=1e-11)
    logs = [json.loads((folder / "logs.json").read_text()) for folder in (one, two)]
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
