"""Laws of what `kdlm plan` foresees of several ranks."""

import json
from dataclasses import replace

import pytest
from recipes_to_plan import CPU, GPU, recipe

from kdlm.cli import main
from kdlm.plan import STRATEGIES, Cluster, Spread, per_rank, placements, predict, sent, strategy_of
from kdlm.plan.ranks import AHEAD, Share
from kdlm.recipe import resolved

STATE = {"weights": 4, "optimiser": 8}
FLOAT32 = {"training.bf16": False}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A deep student's plan in float32: its layers are most of it."""
    given = recipe(tmp_path_factory.mktemp("alone"), FLOAT32, num_hidden_layers=24, vocab_size=100)
    return predict(given, GPU)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_one_rank_is_the_plain_plan_and_sends_nothing(alone, strategy):
    assert per_rank(alone, 1, strategy, sharded_teacher=True) is alone
    assert sent(alone, 1, strategy, sharded_teacher=True) == {}


@pytest.mark.parametrize("ranks", [2, 8])
def test_what_is_shared_out_is_a_rank_th_part_and_the_rest_is_whole(alone, ranks):
    before = alone.phases["loss"]
    whole = alone.traced.student.bytes
    ddp = per_rank(alone, ranks, STRATEGIES["ddp"]).phases["loss"]
    assert all(ddp[part] == before[part] for part in ("weights", "gradients", "optimiser", "teacher weights"))
    shards = per_rank(alone, ranks, STRATEGIES["fsdp2"]).phases["loss"]
    assert before["weights"] - shards["weights"] == pytest.approx(whole * (1 - 1 / ranks), abs=2)
    assert shards["optimiser"] == pytest.approx(before["optimiser"] / ranks, abs=2)
    assert shards["teacher weights"] == before["teacher weights"]
    teacher = alone.traced.teacher
    both = per_rank(alone, ranks, STRATEGIES["fsdp2"], sharded_teacher=True).phases["loss"]
    assert before["teacher weights"] - both["teacher weights"] == pytest.approx(teacher.bytes * (1 - 1 / ranks), abs=2)
    first = per_rank(alone, ranks, STRATEGIES["zero1"]).phases["loss"]
    assert first["optimiser"] == pytest.approx((before["optimiser"] + whole) / ranks, abs=2)
    assert first["weights"] == before["weights"]


def test_under_fsdp2_no_gradient_is_whole_before_it_is_made_nor_more_than_two_layers_after_the_head(alone):
    student, rank = alone.traced.student, Share(alone, 4, STRATEGIES["fsdp2"], sharded_teacher=False)
    layer = student.largest * student.item
    weights = student.rest * student.item + AHEAD * layer
    moments = alone.traced.phases["backward"].moments.values()
    whole = [(moment["gradients"], rank.of(moment, "backward")["gathered"] - weights) for moment in moments]
    assert all(held <= made + 1 for made, held in whole)
    assert max(held for _, held in whole) == pytest.approx(student.head * student.item + 2 * layer)
    assert min(held for _, held in whole) == 0


def test_gloo_holds_a_copy_of_a_layer_that_it_sends_and_nccl_none(alone):
    layer = alone.traced.student.largest * alone.traced.student.item
    there, here = (
        per_rank(found, 4, STRATEGIES["fsdp2"]).phases["backward"] for found in (alone, replace(alone, device=CPU))
    )
    assert 0 < sum(here.values()) - sum(there.values()) <= layer
    ddp = [per_rank(found, 4, STRATEGIES["ddp"]).phases for found in (alone, replace(alone, device=CPU))]
    assert ddp[0] == ddp[1]  # an all-reduce is done in place


def test_a_layer_gives_way_to_the_next_with_both_buffers_held_and_a_loss_keeps_the_last_one(alone):
    student, held = alone.traced.student, per_rank(alone, 4, STRATEGIES["fsdp2"]).phases
    rest, layer = student.rest * student.item, student.largest * student.item
    assert held["student forward"]["gathered"] == pytest.approx(rest + 3 * layer)
    assert held["loss"]["gathered"] == pytest.approx(rest + layer)


def test_more_ranks_never_need_more_memory_each_under_fsdp2(alone):
    totals = [
        per_rank(alone, ranks, STRATEGIES["fsdp2"], sharded_teacher=True).tensors for ranks in (1, 2, 4, 8, 64, 512)
    ]
    assert totals == sorted(totals, reverse=True) and totals[0] > 1.3 * totals[-1]


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_bytes_are_those_of_a_ring(alone, ranks):
    student, teacher, share = alone.traced.student, alone.traced.teacher, (ranks - 1) / ranks
    assert sent(alone, ranks, STRATEGIES["ddp"]) == {"gradients": pytest.approx(2 * share * student.bytes)}
    shards = sent(alone, ranks, STRATEGIES["fsdp2"], sharded_teacher=True)
    assert shards["gradients"] == pytest.approx(share * student.bytes)
    assert shards["weights"] == pytest.approx(share * 4 * (student.everything + student.layers))
    assert shards["teacher"] + shards["teacher's head"] == pytest.approx(share * teacher.bytes)
    summed = sent(alone, ranks, STRATEGIES["zero2"])  # DeepSpeed sums for all ranks, and gives weights round after it
    assert summed == {
        name: pytest.approx(times * share * student.bytes) for name, times in (("gradients", 2), ("weights", 1))
    }


def test_micro_batches_gather_again_and_sum_gradients_once_but_keep_them_whole(tmp_path):
    training = {"bf16": False, "max_steps": 3, "per_device_train_batch_size": 2}
    one, two = (
        predict(recipe(tmp_path, {"training": training | {"gradient_accumulation_steps": steps}}), GPU)
        for steps in (1, 2)
    )
    once, twice = (sent(found, 4, STRATEGIES["fsdp2"], sharded_teacher=True) for found in (one, two))
    assert twice["gradients"] == once["gradients"] and twice["weights"] == 2 * once["weights"]
    assert twice["teacher"] == 2 * once["teacher"]
    kept = per_rank(two, 4, STRATEGIES["fsdp2"]).phases["student forward"]["gradients"]
    assert kept == pytest.approx(two.traced.student.bytes)
    shared = per_rank(two, 4, STRATEGIES["zero2"]).phases["student forward"]["gradients"]
    assert shared == pytest.approx(two.traced.student.bytes / 4, abs=2)


def test_adapters_alone_are_summed(tmp_path):
    found = predict(recipe(tmp_path, FLOAT32 | {"student.lora": {"rank": 4}}), GPU)
    assert 0 < found.traced.student.trained < found.traced.student.everything / 10
    ring = sent(found, 2, STRATEGIES["ddp"])["gradients"]
    assert ring == pytest.approx(found.traced.student.trained * found.traced.student.item)


def test_links_between_machines_are_slower_and_time_is_between_the_longer_and_the_sum(alone):
    near, far = (Spread(alone, Cluster(8, per_node), STRATEGIES["ddp"], "resident") for per_node in (8, 4))
    assert (near.cluster.link, far.cluster.link) == ("NVLink", "InfiniBand") and far.talking > near.talking
    assert near.step_seconds[0] >= alone.step_seconds
    assert near.step_seconds[1] == pytest.approx(alone.step_seconds + near.talking)
    assert 0 < near.utilisation(teacher=False)[0] < near.utilisation(teacher=True)[0] < 1


def test_a_recipe_says_its_strategy(tmp_path):
    given = recipe(tmp_path)
    assert strategy_of(given).name == "ddp"
    for key, value, name in (("fsdp", True, "fsdp2"), ("deepspeed", {"zero_optimization": {"stage": 2}}, "zero2")):
        training = given.training.model_copy(update={key: value})  # not validated: that would start DeepSpeed
        assert strategy_of(given.model_copy(update={"training": training})).name == name


def test_auto_falls_back_to_shards_where_several_ranks_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr("kdlm.plan.placement.world", lambda: (4, 4))
    names = {one.name: one for one in placements(recipe(tmp_path), GPU)}
    assert list(names) == ["resident", "sliced", "next GPU", "served", "sharded"]
    sharded, resident = (names[name].found.phases["loss"]["teacher weights"] for name in ("sharded", "resident"))
    assert sharded == pytest.approx(resident / 4, rel=0.01)


def test_the_command_tells_every_way_to_spread_a_run(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(resolved(recipe(tmp_path)))
    assert main(["plan", str(path), "--gpu", "h100", "--gpus", "16", "--json", "--strategy", "fsdp2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chosen"]["strategy"] == "fsdp2" and len(told["spreads"]) == 5 * 6
    assert {one["placement"] for one in told["spreads"]} == {
        *("resident", "sliced", "sharded", "next GPU", "served", "cached")
    }
    assert main(["plan", str(path), "--gpu", "h100", "--gpus", "12"]) == 2
    assert "--gpus 12: expected a multiple" in capsys.readouterr().err
    assert main(["plan", str(path), "--per-node", "4"]) == 2
