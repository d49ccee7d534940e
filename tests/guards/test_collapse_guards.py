"""Guards fire on students that collapse, leave healthy ones alone, and change no weight."""

import logging
from pathlib import Path

import pytest
import torch
from collapsing import END, Minimised, Paid, arguments, guarded, looks, model, rows, weights, writing
from forks import on_ranks
from safetensors.torch import load_file
from transformers import Trainer

from kdlm import checkpoints
from kdlm.data import Collator
from kdlm.evaluation import EvaluationSection
from kdlm.guards import GuardsSection, Limit, Watched
from kdlm.guards.callback import CollapseGuards
from kdlm.losses import ForwardKL, entropy, kept_rows
from kdlm.methods import LogitKD
from kdlm.models import Lora, WithoutAdapters

ENTROPY = Watched(warn=Limit(below_start=0.8), stop=Limit(below_start=0.3), patience=2)
EVERYTHING = GuardsSection(every=2, entropy=ENTROPY, kl_to_start=Watched(stop=Limit(above=1e3)), rows=4)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_student_whose_entropy_is_minimised_is_warned_of_and_stopped_with_a_checkpoint(tmp_path, caplog) -> None:
    run = guarded(tmp_path, GuardsSection(every=5, entropy=ENTROPY), Minimised([]))
    with caplog.at_level(logging.WARNING):
        run.train()
    stop = run.guards.stopped
    assert (stop.guard, stop.level, stop.looks) == ("entropy", "stop", 2) and run.state.global_step == stop.step < 60
    seen = looks(run, "entropy")
    assert list(seen) == [1, *range(5, stop.step + 1, 5)] and seen[stop.step] < 0.3 * seen[1] == 0.3 * stop.start
    said = [record.getMessage() for record in caplog.records if record.name == "kdlm.guards.callback"]
    assert [line.split(":")[0] for line in said] == ["guards.entropy.warn", "guards.entropy.stop"]
    checkpoint = tmp_path / f"checkpoint-{stop.step}"
    checkpoints.verify(checkpoint)
    assert equal(load_file(checkpoint / "model.safetensors"), weights(run))


def test_a_healthy_run_is_not_stopped(tmp_path: Path) -> None:
    """Forward KL to a teacher that is unsure; cross-entropy on these few rows would end in knowing them by heart."""
    section = GuardsSection(every=5, entropy=ENTROPY, kl_to_start=Watched(stop=Limit(above=1)))
    teacher = guarded(tmp_path / "teacher", None, max_steps=10)
    teacher.train()
    run = guarded(tmp_path / "run", section, LogitKD([ForwardKL()]), teacher=teacher.student)
    run.train()
    assert run.guards.stopped is None and run.state.global_step == 60 and not run.guards.course.warned


@pytest.mark.parametrize(("lora", "limit"), [(None, 2.0), (Lora(rank=2), 0.005)], ids=["whole", "lora"])
def test_kl_to_start_stops_a_learning_rate_that_is_far_too_high(tmp_path: Path, lora: Lora | None, limit) -> None:
    """A head of small random weights that does not train lets adapters move little."""
    section = GuardsSection(every=2, kl_to_start=Watched(stop=Limit(above=limit), patience=1), rows=4)
    for rate, stopped in ((1.0, True), (1e-3, False)):
        run = guarded(tmp_path / f"{rate}", section, student=model(lora), learning_rate=rate, max_steps=12)
        assert isinstance(run.guards.forgetting.start, WithoutAdapters) == (lora is not None)
        run.train()
        assert (run.guards.stopped is not None) == stopped
        assert max(looks(run, "kl_to_start").values()) > 0


@pytest.mark.parametrize(
    ("token", "section"),
    [
        (END, {"length": Watched(stop=Limit(below_start=0.5), patience=2)}),
        (7, {"repetition": Watched(stop=Limit(above=0.5), patience=2)}),
    ],
    ids=["length", "repetition"],
)
def test_a_student_that_is_paid_for_one_token_is_stopped(tmp_path: Path, token: int, section) -> None:
    run = writing(tmp_path, GuardsSection(every=5, **section), Paid(token))
    run.train()
    run.close()
    (name,) = section
    assert run.guards.stopped.guard == name and run.state.global_step < 60
    if name == "length":  # of a step, as the log has it
        logged = next(line for line in run.state.log_history if "rollout/length" in line)
        assert looks(run, name)[1] > logged["rollout/length"] > looks(run, name)[20]


@pytest.mark.parametrize("lora", [None, Lora(rank=2, dropout=0.1)], ids=["whole", "lora"])
def test_guards_change_no_weight(tmp_path: Path, lora: Lora | None) -> None:
    ends, lines = [], []
    for section in (None, EVERYTHING):
        run = guarded(tmp_path, section, student=model(lora), max_steps=10, logging_steps=1)
        run.train()
        ends.append(weights(run))
        lines.append([line["loss"] for line in run.state.log_history if "loss" in line])
    assert len(looks(run, "kl_to_start")) == 6
    assert equal(*ends) and lines[0] == lines[1] and len(lines[0]) == 10


def test_guards_change_no_text_that_a_student_writes(tmp_path: Path) -> None:
    watched = {"length": Watched(stop=Limit(below=0.0)), "entropy": Watched(stop=Limit(below=0.0))}
    every, seldom = (GuardsSection(every=e, **watched) for e in (1, 1000))
    ends = []
    for section in (every, seldom):
        run = writing(tmp_path, section, Paid(7), max_steps=6)
        run.train()
        run.close()
        ends.append(weights(run))
    assert equal(*ends)


def test_the_entropy_is_that_of_the_tokens_trained_on(tmp_path: Path) -> None:
    run = guarded(tmp_path, GuardsSection(entropy=ENTROPY), max_steps=1, per_device_train_batch_size=8, learning_rate=0)
    run.train()
    batch = Collator(END)(rows())
    with torch.no_grad():
        signal = run.networks.views["student"](batch, kept_rows(batch["labels"]))
        expected = entropy(run.student.eval() and signal.head.logits(signal.hidden)).mean()
    assert looks(run, "entropy")[1] == pytest.approx(expected.item(), rel=1e-3)


def test_a_stopped_run_goes_on_only_with_another_limit_and_then_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    section = GuardsSection(every=5, entropy=ENTROPY)
    whole = guarded(tmp_path / "whole", None, Minimised([]), max_steps=40)
    whole.train()
    first = guarded(tmp_path / "run", section, Minimised([]), max_steps=40)
    first.train()
    checkpoint = str(checkpoints.finished(tmp_path / "run")[-1])
    with pytest.raises(ValueError, match=r"guards\.entropy\.stop: .* its guard stopped the run in .*\. It goes on if"):
        guarded(tmp_path / "run", section, Minimised([]), max_steps=40).train(resume_from_checkpoint=checkpoint)
    wider = GuardsSection(every=5, entropy=Watched(stop=Limit(below=0.0)))
    again = guarded(tmp_path / "run", wider, Minimised([]), max_steps=40)
    again.train(resume_from_checkpoint=checkpoint)
    assert again.guards.stopped is None and again.state.global_step == 40
    assert again.guards.course.start == first.guards.course.start
    assert equal(weights(again), weights(whole))


def test_patience_is_not_forgotten_by_a_resumed_run(tmp_path: Path) -> None:
    section = GuardsSection(every=2, entropy=Watched(stop=Limit(below_start=0.9), patience=3))
    whole = guarded(tmp_path / "whole", section, Minimised([]), save_strategy="steps", save_steps=1)
    whole.train()
    stop = whole.guards.stopped
    again = guarded(tmp_path / "again", section, Minimised([]))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop.step - 3}"))
    assert again.guards.stopped == stop


def test_a_run_that_stops_within_an_epoch_does_not_save_as_if_it_had_ended(tmp_path: Path) -> None:
    section = GuardsSection(every=1, kl_to_start=Watched(stop=Limit(below=1.0), patience=3), rows=2)
    run = guarded(tmp_path, section, save_strategy="epoch")  # two steps an epoch
    run.train()
    assert run.state.global_step == 3 and run.state.epoch == 1.5
    assert [folder.name for folder in checkpoints.finished(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_evaluation_and_guards_share_one_start(tmp_path: Path) -> None:
    run = guarded(tmp_path, None)
    run.watch(EvaluationSection(start=True))
    run.guard(GuardsSection(kl_to_start=Watched(stop=Limit(above=1))))
    assert run.guards.forgetting.start is run._watch.start


def test_figures_of_completions_are_refused_where_the_student_writes_none(tmp_path: Path) -> None:
    for name in ("length", "repetition"):
        with pytest.raises(ValueError, match=rf"guards\.{name}: the student writes no text"):
            guarded(tmp_path, GuardsSection(**{name: Watched(stop=Limit(below=1))}))


def test_another_trainer_is_watched_by_what_it_logs(tmp_path: Path) -> None:
    class Told(Trainer):
        def log(self, logs, *args, **kwargs):
            if "loss" in logs:
                logs["entropy"] = 4.0 - self.state.global_step
            super().log(logs, *args, **kwargs)

    args = arguments(tmp_path, logging_steps=1, remove_unused_columns=False)
    run = Told(model(), args, train_dataset=rows(), data_collator=Collator(END, layout="padded"))
    section = GuardsSection(
        every=1, rows=4, entropy=Watched(stop=Limit(below=0), patience=1), kl_to_start=Watched(stop=Limit(above=1e3))
    )
    run.add_callback(guard := CollapseGuards(run, section))
    run.train()
    assert guard.stopped.value == -1.0 and run.state.global_step == 6  # step 6 knows what step 5 logged
    assert looks(run, "kl_to_start")[5] > 0


def test_two_ranks_see_what_one_process_does_and_stop_together(tmp_path: Path) -> None:
    told = []
    for count in (1, 2):
        (folder := tmp_path / str(count)).mkdir()
        on_ranks(count, Path(__file__).with_name("two_ranks_guards.py"), folder)
        told.append(load_file(folder / "looks.safetensors"))
    one, two = told
    assert one["step"] == two["step"] < 60
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)
