"""Laws of where `kdlm plan` puts a teacher, and of what `placement: auto` comes to."""

import json
from dataclasses import replace

import pytest
from recipes_to_plan import CPU, GPU, folder, recipe

from kdlm.cli import main
from kdlm.plan import placements, predict, settled
from kdlm.recipe import Recipe, resolved
from kdlm.train import train

SLICED = {"teacher.placement": "sliced"}
ACCUMULATED = {"training": {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}}


def tensors(found, phase, part):
    return found.phases[phase][part]


def test_a_sliced_teachers_weights_are_on_the_device_in_its_turn_alone(tmp_path):
    resident, sliced = (predict(recipe(tmp_path, ACCUMULATED | more), GPU) for more in ({}, SLICED))
    whole, head = tensors(resident, "loss", "teacher weights"), 4 * 1000 * 96
    assert tensors(sliced, "teacher's turn", "teacher weights") == whole
    for phase in ("student forward", "loss", "backward", "optimiser step"):
        assert tensors(resident, phase, "teacher weights") == whole
        assert tensors(sliced, phase, "teacher weights") == pytest.approx(head, abs=100)  # and buffers
    assert sliced.host == pytest.approx(whole - head, abs=100) and resident.host == 0
    assert "teacher forward" not in sliced.phases


@pytest.mark.parametrize("placement", ["resident", "sliced"])
def test_what_is_answered_ahead_is_counted_for_all_micro_batches(tmp_path, placement):
    changes = ACCUMULATED | {"teacher.placement": placement, "teacher.batch_size": 8}
    found = predict(recipe(tmp_path, changes), GPU)
    assert tensors(found, "backward", "cache") == 4 * 2 * 64 * 96 * 4  # micro-batches, sequences, tokens, width, fp32
    layers = changes | {"method": {"name": "hidden_kd", "layers": [[0, 1]]}}
    assert tensors(predict(recipe(tmp_path, layers), GPU), "backward", "cache") == 2 * 4 * 2 * 64 * 96 * 4


def test_a_larger_batch_of_the_teacher_takes_more_memory_in_its_turn_and_fewer_operations(tmp_path):
    one, eight = (
        predict(recipe(tmp_path, ACCUMULATED | SLICED | {"teacher.batch_size": size}), GPU) for size in (1, 8)
    )
    turn = "teacher's turn"
    assert tensors(eight, turn, "teacher activations") > 4 * tensors(one, turn, "teacher activations")
    assert eight.seconds[turn] < one.seconds[turn]


def test_on_a_cpu_there_is_no_other_memory_to_rest_in(tmp_path):
    resident, sliced = (predict(recipe(tmp_path, more), CPU) for more in ({}, SLICED))
    assert sliced.host == 0 and sliced.tensors >= resident.tensors
    assert [one.name for one in placements(recipe(tmp_path), CPU)] == ["resident", "served"]


def test_the_table_has_every_place_with_its_memory(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(resolved(recipe(tmp_path)))
    assert main(["plan", str(path), "--gpu", "h100"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in ("resident", "sliced", "next GPU", "served"))
    assert main(["plan", str(path), "--gpu", "h100", "--json"]) == 0
    places = json.loads(capsys.readouterr().out)["placements"]
    assert places["sliced"]["host"] > 0 and places["served"]["teacher"] < places["resident"]["teacher"]
    hidden = ["method={name: hidden_kd, layers: [[0, 1]]}"]
    assert main(["plan", str(path), "--gpu", "h100", *hidden]) == 0  # layers are to be had of a model at hand alone
    assert "served" not in capsys.readouterr().out


def deep(path, **changes):
    """A recipe whose teacher's weights are most of what there is."""
    given = recipe(path, {"teacher.placement": "auto", **changes}, vocab_size=100)
    folder(path / "teacher", vocab_size=100, hidden_size=256, num_hidden_layers=8)
    return given


def test_auto_takes_the_first_placement_that_fits_and_says_why(tmp_path, monkeypatch, capsys):
    given = deep(tmp_path)
    resident, sliced, *_ = placements(given, GPU)
    assert sliced.found.total < resident.found.total
    between = (sliced.found.total + resident.found.total) // 2
    for memory, chosen in ((GPU.memory, "resident"), (between, "sliced")):
        monkeypatch.setattr("kdlm.plan.placement.device", lambda _, memory=memory: replace(GPU, memory=memory))
        found, facts = settled(given)
        assert found.teacher.placement == facts["placement"] == chosen
        assert facts["foreseen"]["resident"]["device"] == resident.found.total
        assert f"auto: {chosen}" in capsys.readouterr().out
    monkeypatch.setattr("kdlm.plan.placement.host_memory", lambda: 1)
    with pytest.raises(ValueError, match=r"teacher\.placement: auto: nothing fits"):
        settled(given)


def test_where_nothing_fits_what_would_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("kdlm.plan.placement.device", lambda _: replace(GPU, memory=10**6))
    with pytest.raises(ValueError, match=r"(?s)nothing fits into.*saves .*teacher\.quantization=4bit.*kdlm serve"):
        settled(deep(tmp_path))


def test_a_recipe_that_names_its_placement_is_left_alone(tmp_path):
    given = recipe(tmp_path)
    assert settled(given) == (given, None)


def test_auto_is_settled_before_a_run_in_python_too(tmp_path):
    data = {
        "student": {"name": "sandbox", "model": "code-student-tiny"},
        "teacher": {"name": "sandbox", "model": "code-teacher-tiny", "placement": "auto"},
        "data": {"train": [{"path": "sandbox:code/train", "limit": 8}], "max_length": 64},
        "method": {"name": "logit_kd"},
        "losses": [{"name": "forward_kl"}],
        "training": {"max_steps": 1, "use_cpu": True, "save_strategy": "no"},
        "run_dir": str(tmp_path / "run"),
    }
    given = Recipe.model_validate(data)
    with pytest.raises(ValueError, match=r"kdlm\.plan\.settled"):
        train(given)
    found, facts = settled(given)
    folder = train(found, placement=facts)
    written = json.loads((folder / "environment.json").read_text())["teacher_placement"]
    assert written["placement"] == "resident" and written["foreseen"]["resident"]["fits"]
