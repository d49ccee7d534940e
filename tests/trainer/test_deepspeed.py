"""DeepSpeed ZeRO-1, 2 and 3 on gloo ranks: the same run as one process's, really shared out, saved and resumed."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import on_ranks
from ranks_zero import SOME
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from zero_cases import ALONE, CASES, curve, data, made, zero

from kdlm import DistillTrainer, checkpoints, deepspeed, deepspeed_checkpoints
from kdlm.opening import loaded_student
from kdlm.sandbox import build

pytestmark = [
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed"),
    pytest.mark.timeout(600),  # ranks import for most of it
]
SCRIPT = Path(__file__).with_name("ranks_zero.py")
HANGS = 280.0
"""Seconds after which ranks are taken to hang; on a busy machine they need most of them to import."""


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> Path:
    """What two ranks leave: the curve of every case in its stages, how often heads were gathered, checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    on_ranks(2, SCRIPT, folder, "curves,gathers,saved", "2", seconds=HANGS)
    return folder


def noted(folder: Path, name: str) -> list[float]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow  # the first of all waits for the ranks
@pytest.mark.parametrize("case", CASES)
def test_zero_gives_the_losses_of_one_process(tmp_path: Path, by_two: Path, case: str) -> None:
    alone = made(tmp_path, ALONE.get(case, case), 1, rows_of=case)
    alone.train()
    expected = curve(alone)
    for stage in (stage for stage, cases in SOME.items() if case in cases):
        assert noted(by_two, f"{stage}-{case}") == pytest.approx(expected, rel=1e-5), f"ZeRO-{stage}"


@pytest.mark.slow
def test_heads_are_gathered_once_a_step_and_not_once_a_chunk(by_two: Path) -> None:
    seen, steps = json.loads((by_two / "gathers.json").read_text()), 4
    assert seen["teacher"] == steps
    assert steps <= seen["student"] <= 2 * steps  # for the forward pass, and for the backward one


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 1])
def test_a_run_of_two_ranks_goes_on_with_as_many_or_others(by_two: Path, ranks: int) -> None:
    on_ranks(ranks, SCRIPT, by_two, "resumed", str(ranks), seconds=HANGS)
    for stage in (2, 3):
        unbroken, resumed = noted(by_two, f"unbroken-{stage}"), noted(by_two, f"resumed-{stage}-{ranks}")
        assert resumed == (unbroken if ranks == 2 else pytest.approx(unbroken, rel=1e-5)), f"ZeRO-{stage}"


RECIPE = """
student: {{name: sandbox, model: code-student-tiny}}
teacher: {{name: sandbox, model: code-teacher-tiny, placement: sharded}}
data: {{train: [{{path: "sandbox:code/eval", limit: 8}}], max_length: 48}}
method: {{name: logit_kd}}
losses: [{{name: forward_kl}}]
training: {{max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-3, use_cpu: true, deepspeed: {config}}}
run_dir: {folder}/run
"""


@pytest.mark.slow
def test_a_finished_run_leaves_a_plain_student(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, config=json.dumps(zero(3))))
    on_ranks(2, SCRIPT, tmp_path, "verb", "2", seconds=HANGS)
    written = load_file(tmp_path / "run" / "student" / "model.safetensors")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert all(torch.equal(written[name], p) for name, p in opened.named_parameters() if name in written)
    began = AutoModelForCausalLM.from_pretrained(build("code-student-tiny"))
    moved = [not torch.equal(p, q) for p, q in zip(opened.parameters(), began.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.slow
def test_the_manifest_covers_the_files_of_all_ranks(by_two: Path) -> None:
    folder = by_two / "zero3" / "turns" / "checkpoint-2"
    sealed = json.loads((folder / checkpoints.MANIFEST).read_text())
    for rank in (0, 1):
        assert f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in sealed
        assert f"rng_state_{rank}.pth" in sealed


@pytest.mark.slow
def test_a_checkpoint_of_deepspeed_does_not_go_on_without_it(tmp_path: Path, by_two: Path) -> None:
    folder = by_two / "zero3" / "turns" / "checkpoint-2"
    with pytest.raises(ValueError, match=r"saved under DeepSpeed: go on with training\.deepspeed"):
        made(tmp_path, "turns", 1).train(resume_from_checkpoint=str(folder))


def arguments(folder: Path, **config) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, deepspeed=zero(3) | config)


def trainer(args: TrainingArguments) -> DistillTrainer:
    return DistillTrainer(tiny_model(1), tiny_model(2), args, train_dataset=data("logit_kd"))


def test_ranks_that_believe_to_be_alone_are_refused(tmp_path: Path, monkeypatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started .* believes in 1.* training.use_cpu: true"):
        trainer(args)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 0}}, "nothing is partitioned"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, "leave `optimizer` out"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "leave `scheduler` out"),
    ],
)
def test_what_deepspeed_would_do_otherwise_is_refused(tmp_path: Path, config: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trainer(arguments(tmp_path, **config))


def test_roles_are_not_clipped_to_one_norm_in_the_hosts_memory() -> None:
    config = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    settings = SimpleNamespace(config=config, get_value=lambda key, default: "cpu", is_zero3=lambda: False)
    deepspeed.settle(SimpleNamespace(hf_ds_config=settings), roles=1)
    with pytest.raises(ValueError, match="clips all networks to one norm"):
        deepspeed.settle(SimpleNamespace(hf_ds_config=settings), roles=2)


def test_a_configuration_that_does_not_say_it_clips_as_the_run_does() -> None:
    config: dict = {"zero_optimization": {"stage": 2}}
    settings = SimpleNamespace(config=config, get_value=lambda key, default: default, is_zero3=lambda: False)
    deepspeed.settle(SimpleNamespace(hf_ds_config=settings), roles=1, limit=0.7)
    assert config["gradient_clipping"] == 0.7


def test_a_checkpoint_that_leaves_a_rank_without_a_piece_is_refused() -> None:
    def engine(stage: int) -> SimpleNamespace:
        optimizer = SimpleNamespace(
            param_groups=[{"role": "student"}, {"role": "critic"}],
            bit16_groups=[[torch.zeros(90)], [torch.zeros(3)]],
            partition_size=[23, 1],
        )
        return SimpleNamespace(zero_optimization_stage=lambda: stage, optimizer=optimizer)

    deepspeed_checkpoints._require_pieces_for_all(engine(3), 4)
    deepspeed_checkpoints._require_pieces_for_all(engine(2), 3)
    with pytest.raises(ValueError, match=r"up on 4 ranks: the role 'critic' has a group of 3 weights"):
        deepspeed_checkpoints._require_pieces_for_all(engine(2), 4)


def test_students_are_opened_whole_whatever_makes_them(tmp_path: Path) -> None:
    kept = arguments(tmp_path)  # from now on transformers partitions what it opens
    seen = []
    section = SimpleNamespace(load=lambda: seen.append(is_deepspeed_zero3_enabled()))
    loaded_student(SimpleNamespace(student=section), None)  # pyright: ignore[reportArgumentType]
    assert seen == [False] and is_deepspeed_zero3_enabled() and kept is not None


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_accelerate_reads_its_configurations_as_they_are_meant(monkeypatch, name: str) -> None:
    from accelerate.commands import launch
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    path = Path(__file__).parents[2] / "recipes" / "accelerate" / f"{name}.yaml"
    words = ["--config_file", str(path), "-m", "kdlm", "train", "recipe.yaml"]
    given = []
    monkeypatch.setattr(launch, "deepspeed_launcher", given.append)
    launch.launch_command(launch.launch_command_parser().parse_args(words))
    assert given[0].use_deepspeed and given[0].num_processes == 8
    _, environment = prepare_deepspeed_cmd_env(given[0])
    for key, value in environment.items():
        if key.startswith("ACCELERATE"):
            monkeypatch.setenv(key, value)
    config = DeepSpeedPlugin().deepspeed_config
    sharing = config["zero_optimization"]
    assert sharing["stage"] == int(name[4])
    assert sharing["offload_param"]["device"] == ("cpu" if name.endswith("offload") else "none")
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"


def test_kdlm_itself_does_not_import_deepspeed() -> None:
    code = (
        "import sys, kdlm.train, kdlm.trainer; from transformers import Trainer; import accelerate, peft;"
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_piece_of_a_buffer_is_written_as_a_weight_of_its_own() -> None:
    buffer, alone = torch.arange(6.0), torch.arange(3.0)
    assert deepspeed.of_its_own(buffer[:3]).untyped_storage().nbytes() == alone.nbytes
    assert deepspeed.of_its_own(alone) is alone
