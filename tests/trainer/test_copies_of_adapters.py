"""Averages and snapshots of a student that trains adapters, through a whole run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import rows, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kdlm import DistillTrainer
from kdlm.losses import ForwardKL
from kdlm.methods import EmaOf, LogitKD, Role, SnapshotOf, Trainable
from kdlm.models import FrozenCopy, Lora, adapt
from kdlm.networks import Networks, role_plan


class Copied(LogitKD):
    """Forward KL beside an average that moves every second step, and a snapshot that is taken every third."""

    exported = "average"

    @property
    def roles(self) -> dict[str, Role]:
        return {
            "student": Trainable(),
            "average": EmaOf("student", 0.5, every=2),
            "synchronised": SnapshotOf("student", at=lambda done: done % 3 == 0),
            "start": SnapshotOf("student", at=lambda done: False),
        }


def trainer(arguments, lora: Lora | None, **options) -> DistillTrainer:
    torch.manual_seed(5)
    student = tiny_model(1) if lora is None else adapt(tiny_model(1), lora)
    options = {
        "max_steps": 7,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "per_device_train_batch_size": 2,
        **options,
    }
    return DistillTrainer(
        student, tiny_model(2), arguments(**options), method=Copied([ForwardKL()]), train_dataset=rows([5, 7, 4, 6])
    )


def state(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


KINDS = {"plain": None, "lora": Lora(rank=2), "dora": Lora(rank=2, dora=True, modules_to_save=["lm_head"])}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_move_at_their_steps_and_stay_as_they_are_between(arguments, kind: str) -> None:
    run = trainer(arguments, KINDS[kind])
    seen, plain = [], []
    after = run._after_step

    def look() -> None:
        after()
        seen.append({name: state(module) for name, module in run.networks.averages.items()})
        plain.append(state(FrozenCopy(run.student).module))

    began = {name: state(module) for name, module in run.networks.averages.items()}
    start = state(FrozenCopy(run.student).module)
    run._after_step = look
    run.train()
    assert all(same(state, start) for state in began.values()), "at step 0 each is the student as it begins"
    for step in range(1, 8):
        now, before = seen[step - 1], began if step == 1 else seen[step - 2]
        assert same(now["average"], before["average"]) == (step % 2 == 1)
        assert same(now["synchronised"], plain[step - 1]) == (step % 3 == 0)
        assert same(now["synchronised"], before["synchronised"]) == (step % 3 != 0)
        assert same(now["start"], start)
    for name, value in seen[1]["average"].items():
        torch.testing.assert_close(value, 0.5 * start[name] + 0.5 * plain[1][name])


@pytest.mark.parametrize("cut", [3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_with_its_copies_bit_for_bit(arguments, tmp_path: Path, kind: str, cut: int) -> None:
    whole = trainer(arguments, KINDS[kind], save_strategy="steps", save_steps=cut)
    whole.train()
    again = trainer(arguments, KINDS[kind], output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{cut}"))
    assert same(state(again.student), state(whole.student))
    for name, module in whole.networks.averages.items():
        assert same(state(again.networks.averages[name]), state(module)), name


def test_the_average_of_a_lora_student_is_read_and_exported_as_a_plain_model(arguments, tmp_path: Path) -> None:
    run = trainer(arguments, Lora(rank=2), save_strategy="steps", save_steps=7)
    run.train()
    assert type(run.exported) is LlamaForCausalLM
    saved = load_file(tmp_path / "run" / "checkpoint-7" / "kdlm" / "average.safetensors")
    assert not any("lora" in name for name in saved)
    run.exported.save_pretrained(tmp_path / "average")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    assert same(state(opened), state(run.exported))


def test_what_follows_an_average_of_the_student_is_seen_as_a_language_model_too() -> None:
    method = LogitKD([ForwardKL()])
    chain = {"student": Trainable(), "average": EmaOf("student"), "older": SnapshotOf("average")}
    method.__class__ = type("Chained", (LogitKD,), {"roles": chain})
    views = Networks(adapt(tiny_model(1), Lora(rank=2)), method, None).views
    assert views["older"].reads_hidden and views["average"].reads_hidden


def test_the_plan_of_a_long_run_names_few_of_many_snapshots() -> None:
    lines = role_plan(Copied([ForwardKL()]), 3000)
    assert lines[1:3] == [
        "average: average of student, decay 0.5 every 2 of its own steps",
        "synchronised: copy of student, taken after step 3, 6, 9, ..., 3000",
    ]
    assert role_plan(Copied([ForwardKL()]), 2)[2] == "synchronised: copy of student, taken as it starts"


RECIPE = """
student: {name: sandbox, model: code-student-tiny, lora: {rank: 4}}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 32}
method: {name: custom, target: "test_copies_of_adapters:Copied"}
losses: [{name: forward_kl}]
training: {max_steps: 4, per_device_train_batch_size: 4, learning_rate: 0.01, use_cpu: true}
run_dir: RUN
"""


def test_a_recipe_hands_out_the_average_of_a_lora_student_as_a_plain_folder(tmp_path: Path) -> None:
    from kdlm.recipe import load
    from kdlm.train import assemble, train

    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("RUN", str(tmp_path / "run")))
    for wrong in (train, assemble):
        with pytest.raises(ValueError, match=r"student\.lora\.export: an average is handed out"):
            wrong(load(path, ["student.lora.export=adapter"]))
    folder = train(load(path))
    assert not (folder / "student" / "adapter_config.json").exists()
    exported = state(AutoModelForCausalLM.from_pretrained(folder / "student"))
    average = load_file(folder / "checkpoint-4" / "kdlm" / "average.safetensors")
    assert average and all(torch.equal(exported[name], value) for name, value in average.items())
