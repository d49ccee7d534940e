"""Layers and heads sliced over ranks (tensor parallelism): the run of one process, and no rank gathers a head."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sharded_verbs
import torch
import two_ranks_slices
from forks import on_ranks
from safetensors.torch import load_file
from tiny_models import rows, tiny_model
from transformers import AutoModelForCausalLM

from kdlm import DistillTrainer, checkpoints, cli, parallelism
from kdlm.data import Collator
from kdlm.methods import LogitKD
from kdlm.networks import Networks
from kdlm.teachers import SandboxTeacherSection

pytestmark = pytest.mark.timeout(600)  # ranks import for most of it

SCRIPT = Path(two_ranks_slices.__file__)
HOW = {True: ("sliced", "sliced"), False: ("whole", "whole")}
TOLERANCE = 1e-12
"""Of fp64 losses, norms and weights after four steps of AdamW; what is logged went through fp32, and agrees exactly."""


@pytest.mark.parametrize(
    ("teacher", "tied", "teacher_ids"), [("sliced", False, 61), pytest.param("whole", True, 64, marks=pytest.mark.slow)]
)
def test_ranks_that_hold_slices_take_the_steps_of_one_process(
    tmp_path: Path, teacher: str, tied: bool, teacher_ids: int
) -> None:
    """Counts, accumulation, clipping, evaluation and the saved student; that layers are sliced is asserted there."""
    two_ranks_slices.save_models(tmp_path, tied=tied, teacher_ids=teacher_ids)
    on_ranks(1, SCRIPT, tmp_path, "whole", "whole")
    on_ranks(2, SCRIPT, tmp_path, "sliced", teacher)
    for method in two_ranks_slices.METHODS:
        one, two = tmp_path / "whole-whole" / method, tmp_path / f"sliced-{teacher}" / method
        expected, found, other = (json.loads(file.read_text()) for file in (
            one / "rank-0.json", two / "rank-0.json", two / "rank-1.json"
        ))  # fmt: skip
        assert found == other, "ranks that read the same rows say the same"
        for name in ("losses", "norms"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6), name
        assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=TOLERANCE)
        ours, theirs = (load_file(folder / "weights.safetensors") for folder in (two, one))
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, rtol=TOLERANCE, atol=TOLERANCE)
        saved = AutoModelForCausalLM.from_pretrained(two / "saved", dtype=torch.float64)
        for name, weight in saved.named_parameters():
            assert torch.equal(weight, ours[f"role.student.{name}"]), name
        by_kernel = method != "a loss without a kernel"
        assert (not found["gathered"]) == by_kernel, f"{method}: heads gathered: {found['gathered']}"


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "resumed"), [(2, (2, 1, 4)), (1, (2,))], ids=["slices", "whole"])
def test_a_checkpoint_of_slices_goes_on_on_any_number_of_ranks(
    tmp_path: Path, saved: int, resumed: tuple[int, ...]
) -> None:
    """Saved after two of four steps, with projectors that are whole beside slices: the unbroken run's end."""
    two_ranks_slices.save_models(tmp_path, tied=False, teacher_ids=61, heads=4)
    on_ranks(saved, SCRIPT, tmp_path, *HOW[saved > 1], "save", "2", seconds=300)
    unbroken = tmp_path / "-".join(HOW[saved > 1]) / "hidden_kd"
    expected, end = json.loads((unbroken / "rank-0.json").read_text()), load_file(unbroken / "weights.safetensors")
    assert len(expected["losses"]) == 4
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoints.verify(checkpoint)
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir() == (saved > 1)
    AutoModelForCausalLM.from_pretrained(checkpoint)  # a plain folder, too
    for ranks in resumed:
        again = tmp_path / f"on-{ranks}"
        again.mkdir()
        for name in ("student", "teacher"):
            (again / name).symlink_to(tmp_path / name)
        on_ranks(ranks, SCRIPT, again, *HOW[ranks > 1], "resume", str(checkpoint), seconds=300)
        out = again / "-".join(HOW[ranks > 1]) / "hidden_kd"
        found = json.loads((out / "rank-0.json").read_text())
        for name in ("losses", "norms"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6), f"{ranks} ranks: {name}"
        assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=TOLERANCE)
        ours = load_file(out / "weights.safetensors")
        for name, weight in end.items():
            torch.testing.assert_close(ours[name], weight, rtol=TOLERANCE, atol=TOLERANCE)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("CP", r"cp_size: context parallelism"),
        ("SP", r"sp_size: sequence parallelism"),
        ("TP", r"tp_size: the student"),
    ],
)
def test_what_the_launcher_asks_for_and_nobody_would_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: Any, size: str, said: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")  # as accelerate launch says it
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size}_SIZE", "2")
    with pytest.raises(ValueError, match=said):
        DistillTrainer(tiny_model(1), tiny_model(2), arguments(), method=LogitKD())


def sliced(model: Any) -> Any:
    """Return a model that says of itself what transformers says of one sliced over two ranks."""
    model._tp_size = 2
    return model


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fsdp": True}, "never run with FSDP or DeepSpeed"),
        ({"needs": {"rollouts"}}, "never run with text of its own"),
        ({"ranks": 4}, "sliced over 2 of 4 ranks"),
    ],
)
def test_what_was_never_run_beside_slices_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    given = {"fsdp": False, "needs": set(), "ranks": 2} | changes
    monkeypatch.setattr(parallelism, "ranks", lambda: given["ranks"])
    args = SimpleNamespace(fsdp=given["fsdp"], deepspeed_plugin=None)
    networks = Networks(tiny_model(1), LogitKD(), None)
    parallelism.refuse_beside_slices(args, networks, None, given["needs"])  # whole: nothing is
    sliced(networks.student)
    with pytest.raises(ValueError, match=f"tensor parallelism: .*{said}"):
        parallelism.refuse_beside_slices(args, networks, None, given["needs"])


def test_a_sliced_teacher_wants_a_sliced_student(arguments: Any) -> None:
    data = {"train_dataset": rows([4, 5]), "data_collator": Collator(0, layout="padded")}
    with pytest.raises(ValueError, match="the teacher is sliced over ranks and the student is not"):
        DistillTrainer(tiny_model(1), sliced(tiny_model(2)), arguments(), method=LogitKD(), **data)


# --- from a recipe --------------------------------------------------------------------------------------------------

RECIPE = """
student: {name: sandbox, model: code-student-tiny, tensor_parallel: SLICED}
teacher: {name: sandbox, model: code-teacher-tiny, tensor_parallel: SLICED}
data: {train: [{path: "sandbox:code/train", limit: 2}], eval: [{path: "sandbox:code/eval", limit: 1}], max_length: 64}
method: {name: logit_kd}
losses: [{name: forward_kl}, {name: cross_entropy, weight: 0.1}]
training:
  {max_steps: 3, per_device_train_batch_size: 4, logging_steps: 1, use_cpu: true, eval_strategy: steps, eval_steps: 2,
   save_steps: 2, load_best_model_at_end: true, metric_for_best_model: loss, greater_is_better: true}
"""


def written(folder: Path, *, tensor_parallel: bool) -> Path:
    """Write the recipe into a new folder, which its run goes into too."""
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("SLICED", str(tensor_parallel).lower()) + f"run_dir: {folder / 'run'}\n")
    return recipe


def test_a_recipe_slices_both_models_and_hands_out_the_best_student_of_one_process(tmp_path: Path) -> None:
    """The best is said to be the one of the greater loss, of two steps out of three: a checkpoint of slices is read."""
    script = Path(sharded_verbs.__file__)
    students, losses = [], []
    for ranks in (1, 2):
        recipe = written(tmp_path / str(ranks), tensor_parallel=ranks == 2)
        on_ranks(ranks, script, recipe.parent, str(recipe))
        students.append(load_file(recipe.parent / "run" / "student" / "model.safetensors"))
        results = json.loads((recipe.parent / "run" / "results.json").read_text())
        assert results["best"]["step"] == 2
        losses.append(results["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert students[0].keys() == students[1].keys()
    for name, weight in students[0].items():  # float32, after three steps of AdamW
        torch.testing.assert_close(students[1][name], weight, rtol=1e-4, atol=1e-5)


def test_slices_of_one_process_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(written(tmp_path / "alone", tensor_parallel=True))]) == 2
    assert "tensor_parallel: slices are for several ranks" in capsys.readouterr().err


def test_ring_attention_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    assert cli.main(["train", str(written(tmp_path / "cut", tensor_parallel=False))]) == 2
    assert "parallelism_config.cp_size: context parallelism has ring attention" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "run").exists()


@pytest.mark.parametrize("keys", [{"placement": "sliced"}, {"device": "cpu"}])
def test_a_sliced_teacher_stays_where_it_is(keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="tensor_parallel: slices stay where they are"):
        SandboxTeacherSection.model_validate({"model": "code-teacher-tiny", "tensor_parallel": True, **keys})
