"""Runs in shards are the runs of one process: gloo ranks that really hold their share, asserted on each."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import sharded_runs
import torch
from forks import on_ranks
from safetensors.torch import load_file
from tiny_models import rows, tiny_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from kdlm import DistillTrainer, checkpoints
from kdlm.evaluation import EvaluationSection, Generations
from kdlm.evaluation.in_step import in_step
from kdlm.evaluation.watch import share_of
from kdlm.losses import CrossEntropy
from kdlm.methods import LogitKD
from kdlm.sharding import refuse_pretence, settle, sharded
from kdlm.teachers import LocalTeacher, SandboxTeacherSection

pytestmark = pytest.mark.timeout(600)  # ranks import for most of it

SCRIPT = Path(sharded_runs.__file__)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process comes to, by method."""
    folder = tmp_path_factory.mktemp("one")
    on_ranks(1, SCRIPT, folder, "one process", *sharded_runs.METHODS, seconds=300)
    return folder


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        ("ddp, teacher sharded", 2),
        ("fsdp2", 2),
        pytest.param("ddp", 4, marks=pytest.mark.slow),
        pytest.param("fsdp2", 4, marks=pytest.mark.slow),
    ],
)
def test_every_method_takes_the_steps_of_one_process(
    one_process: Path, tmp_path: Path, strategy: str, ranks: int
) -> None:
    """Losses, evaluation and weights; in the second step a rank has no token, and evaluation has an odd row."""
    on_ranks(ranks, SCRIPT, tmp_path, strategy, *sharded_runs.METHODS, seconds=300)
    for method in sharded_runs.METHODS:
        here, there = sharded_runs.read(tmp_path / method), sharded_runs.read(one_process / method)
        curve, weights = sharded_runs.differences(here, there)
        assert curve < TOLERANCE and weights < TOLERANCE, f"{method}: {curve:.1e} {weights:.1e}"
        ours, theirs = (json.loads((f / method / "evaluation.json").read_text()) for f in (tmp_path, one_process))
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE), f"{method}: {name}"


@pytest.mark.slow
def test_methods_on_the_inside_and_averages_take_the_steps_of_one_process(tmp_path: Path) -> None:
    """Of some layers nothing is read but queries, keys and values, and the layers above are left out."""
    names = tuple(sharded_runs.INSIDE)
    for ranks, strategy in ((1, "one process"), (2, "fsdp2"), (2, "zero3")):
        on_ranks(ranks, SCRIPT, tmp_path, strategy, *names, seconds=300)
        for method in names:
            left = sharded_runs.read(tmp_path / method)
            if ranks == 1:
                (tmp_path / method).rename(tmp_path / f"one {method}")
                continue
            curve, weights = sharded_runs.differences(left, sharded_runs.read(tmp_path / f"one {method}"))
            assert curve < TOLERANCE and weights < TOLERANCE, f"{strategy}, {method}: {curve:.1e} {weights:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["fsdp2", "fsdp2, sharded checkpoints", "one process"])
@pytest.mark.parametrize("method", ["lora", "two networks"])
def test_a_checkpoint_goes_on_with_any_number_of_ranks(tmp_path: Path, saved: str, method: str) -> None:
    """Saved on 2 after the first of five steps (one of two networks has not moved), resumed on 4 and on 1."""
    if (saved, method) == ("one process", "lora"):
        pytest.skip("adapters alone are refused under FSDP, see below")
    on_ranks(1 if saved == "one process" else 2, SCRIPT, tmp_path, saved, "save", "1", method)
    unbroken = sharded_runs.read(tmp_path / method)
    for ranks, strategy in ((4, "fsdp2, sharded checkpoints"), (1, "one process")):
        (again := tmp_path / str(ranks)).mkdir()
        on_ranks(ranks, SCRIPT, again, strategy, "resume", str(tmp_path), "1", method)
        curve, weights = sharded_runs.differences(sharded_runs.read(again / method), unbroken)
        assert curve < TOLERANCE and weights < TOLERANCE, f"{ranks} ranks: {curve:.1e} {weights:.1e}"


def test_fsdp_that_accelerate_would_leave_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch says it
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"training\.fsdp: FSDP was asked for, and accelerate does not shard"):
        DistillTrainer(tiny_model(1), tiny_model(2), args, method=LogitKD())


def test_a_sharded_teacher_needs_ranks() -> None:
    with pytest.raises(ValueError, match=r"teacher\.placement: sharded needs several ranks"):
        sharded(sharded_runs.load_teacher, torch.device("cpu"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"offload": True}, "offload is of shards"),
        ({"placement": "sharded", "device": "cpu"}, "leave device"),
        ({"placement": "sharded", "quantization": "8bit"}, "leave quantization out"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(keys: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SandboxTeacherSection.model_validate({"model": "code-teacher-tiny", **keys})


@pytest.mark.slow
def test_kdlm_train_hands_out_the_best_student_of_shards(tmp_path: Path) -> None:
    """Adapters merged, in pieces until then: the plain model folder of one process."""
    students = []
    for ranks in (1, 2):
        sharding = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}} if ranks > 1 else {}
        recipe = {
            "student": {"name": "sandbox", "model": "code-student-tiny", "dtype": "float32", "lora": {"rank": 4}},
            "teacher": {"name": "sandbox", "model": "code-teacher-tiny", "dtype": "float32"},
            "data": {
                "train": [{"path": "sandbox:code/train", "limit": 3}],
                "eval": [{"path": "sandbox:code/eval", "limit": 1}],
                "max_length": 64,
            },
            "method": {"name": "logit_kd"},
            "losses": [{"name": "forward_kl"}],
            "training": {
                **{"max_steps": 2, "per_device_train_batch_size": 8 // ranks, "use_cpu": True, "logging_steps": 1},
                **{"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "learning_rate": 1e-3},
                **{"load_best_model_at_end": True, "metric_for_best_model": "loss"},
                **sharding,
            },
            "run_dir": str(tmp_path / f"run-{ranks}"),
        }
        recipe["teacher"] |= {"placement": "sharded"} if ranks > 1 else {}
        (tmp_path / f"{ranks}.yaml").write_text(json.dumps(recipe))
        words = (tmp_path, str(tmp_path / f"{ranks}.yaml"))
        on_ranks(ranks, SCRIPT.with_name("sharded_verbs.py"), *words, seconds=300)
        students.append(load_file(tmp_path / f"run-{ranks}" / "student" / "model.safetensors"))
    assert students[0].keys() == students[1].keys()
    for name, weight in students[0].items():
        torch.testing.assert_close(
            students[1][name], weight, rtol=TOLERANCE, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_what_a_killed_run_of_more_ranks_left_is_no_part_of_a_checkpoint(arguments) -> None:
    run = DistillTrainer(
        tiny_model(1), tiny_model(2), arguments(save_strategy="steps", save_steps=1), train_dataset=rows([5] * 8)
    )
    left = Path(run.args.output_dir) / "checkpoint-1"
    left.mkdir(parents=True)
    (left / "rng_state_3.pth").touch()
    run.train()
    assert (left / "model.safetensors").is_file() and (left / checkpoints.MANIFEST).is_file()
    assert not (left / "rng_state_3.pth").exists()


def test_a_rank_without_a_row_reads_one_that_does_not_count() -> None:
    images = [{"pixel_values": torch.zeros(1)}]
    counted = []
    for rank in range(2):
        args = SimpleNamespace(world_size=2, process_index=rank, eval_batch_size=2)
        read = in_step(share_of(images, args, lambda some: some), SimpleNamespace(args=args))
        counted.append([(len(batch), counts) for batch, counts in read])
    assert counted == [[(1, True)], [(1, False)]]


class _Averaged(LogitKD):
    ema = 0.9


def test_averages_are_where_a_rank_computes_though_the_trainer_moves_nothing(arguments, monkeypatch) -> None:
    args = arguments()
    assert args.device.type == "cpu"
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    monkeypatch.setattr(TrainingArguments, "place_model_on_device", False)  # as under FSDP2
    run = DistillTrainer(tiny_model(1), None, args, method=_Averaged([CrossEntropy()]))
    assert all(p.is_meta for p in run.networks.averages["average"].parameters())
    assert not any(p.is_meta for p in run.networks.parameters())


def test_losses_and_sums_of_gradients_are_no_bfloat16_under_fsdp() -> None:
    half = torch.bfloat16
    plugin = SimpleNamespace(mixed_precision_policy=MixedPrecisionPolicy(half, half, half))
    settle(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(half, torch.float32, None)


def test_networks_that_fsdp_would_open_on_one_rank_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), is_fsdp2=True)
    with pytest.raises(ValueError, match=r"cpu_ram_efficient_loading: .* set false"):
        refuse_pretence(accelerator)


def test_a_teacher_in_shards_has_no_fingerprint() -> None:
    with pytest.raises(ValueError, match="use resident"):
        LocalTeacher(tiny_model(2), computes_on=torch.device("cpu")).fingerprint()


def test_text_is_not_written_under_zero3_at_every_ranks_own_pace(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdlm.evaluation.summed.cuts_weights", lambda accelerator: True)
    run = DistillTrainer(tiny_model(1), tiny_model(2), arguments())
    with pytest.raises(ValueError, match=r"evaluation\.generations: under ZeRO-3"):
        run.watch(EvaluationSection(generations=Generations(prompts=1)))
