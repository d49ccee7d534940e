"""Ranks that have a part of every sequence each take the steps of one process; what cannot be cut is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cut_runs
import pytest
import sharded_runs
import torch
from accelerate import ParallelismConfig
from forks import on_ranks
from safetensors.torch import load_file
from tiny_models import rows, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from kdlm import DistillTrainer, cut_sequences, deepspeed_checkpoints
from kdlm.capture import capture
from kdlm.data import Collator
from kdlm.losses import CrossEntropy, ForwardKL, kept_rows
from kdlm.methods import GKD, HiddenKD, LogitKD, MiniLM, SequenceKD, Taid
from kdlm.models import Part, PartReader, refuse_parts, view
from kdlm.models.prediction import Predictor
from kdlm.recipe import load
from kdlm.teachers import LocalTeacher, SelfTeacher

pytestmark = pytest.mark.timeout(600)  # ranks import for most of it

SCRIPT = Path(cut_runs.__file__)
TOLERANCE = 1e-5
SECONDS = 400


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process comes to, by case."""
    folder = tmp_path_factory.mktemp("one")
    on_ranks(1, SCRIPT, folder, "1", "0", *cut_runs.CASES, seconds=SECONDS)
    return folder


def assert_same(here: Path, there: Path) -> None:
    curve, weights = sharded_runs.differences(sharded_runs.read(here), sharded_runs.read(there))
    assert curve < TOLERANCE and weights < TOLERANCE, f"{here.name}: {curve:.1e} {weights:.1e}"
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (here, there))
    assert ours == pytest.approx(theirs, rel=TOLERANCE), here.name


ALL, SOME = tuple(cut_runs.CASES), ("logit_kd", "taid", "beginnings")


@pytest.mark.parametrize(
    ("ranks", "stage", "cases"),
    [
        (2, 2, ALL),
        (4, 3, SOME),
        pytest.param(2, 1, SOME, marks=pytest.mark.slow),
    ],
)
def test_ranks_with_parts_of_sequences_take_the_steps_of_one_process(
    one_process: Path, tmp_path: Path, ranks: int, stage: int, cases: tuple[str, ...]
) -> None:
    """Losses, weights and evaluation, on one or two groups of two; what a rank reads is asserted there."""
    on_ranks(ranks, SCRIPT, tmp_path, "2", str(stage), *cases, seconds=SECONDS)
    for case in cases:
        assert_same(tmp_path / case, one_process / case)
        each, (one,) = seen(tmp_path / case), seen(one_process / case)
        assert len(each) == ranks
        assert sum(sum(rank["rows"]) for rank in each) == sum(one["rows"]), "every row is of one rank"
    later = [sum(rank["rows"]) for rank in seen(tmp_path / "beginnings")]
    assert [rows > 0 for rows in later] == [rank % 2 == 0 for rank in range(ranks)], "later parts have no row"
    if ranks == 2 and stage < 3:  # micro-batches have the rows of one process, and no graph keeps gathered weights
        (one,) = seen(one_process / "logit_kd")
        for rank in seen(tmp_path / "logit_kd"):
            assert max(rank["kept"]) < 0.65 * max(one["kept"]), "half of the activations, and what rounding adds"


def seen(folder: Path) -> list[dict[str, list[int]]]:
    """Return what each rank has seen of a run."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("seen-*.json"))]


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_as_many_ranks_or_others(one_process: Path, tmp_path: Path) -> None:
    on_ranks(2, SCRIPT, tmp_path, "2", "3", "save", "2", "taid", seconds=SECONDS)
    for ranks in (2, 4):
        (again := tmp_path / str(ranks)).mkdir()
        on_ranks(ranks, SCRIPT, again, "2", "3", "resume", str(tmp_path), "2", "taid", seconds=SECONDS)
        assert_same(again / "taid", one_process / "taid")


def test_a_checkpoint_that_deepspeed_cannot_turn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latest").write_text("global_step2")
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    engine = SimpleNamespace(sequence_parallel_size=2, zero_optimization_stage=lambda: 2)
    with pytest.raises(ValueError, match="is of 1 ranks, and under ZeRO-1 and 2 DeepSpeed takes ranks that share"):
        deepspeed_checkpoints.load(engine, tmp_path)


RECIPE = """
student: {name: sandbox, model: code-student-tiny, dtype: float32}
teacher:
  name: cached
  path: FOLDER/capture
  of: {name: sandbox, model: code-teacher-tiny, dtype: float32}
  format: {name: hidden, dtype: float32}
data: {train: [{path: "sandbox:code/train", limit: 3}], max_length: 64, eval_rows: 2}
method: {name: logit_kd}
losses: [{name: forward_kl}, {name: cross_entropy, weight: 0.1}]
training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 0.001, logging_steps: 1, use_cpu: true,
           save_strategy: "no"HOW}
run_dir: FOLDER/RUN
"""


def test_a_recipe_with_a_captured_teacher_hands_out_the_student_of_one_process(tmp_path: Path) -> None:
    students, losses = [], []
    for ranks in (1, 2):
        how = "" if ranks == 1 else f", deepspeed: {json.dumps(cut_runs.zero(2))}"
        text = RECIPE.replace("FOLDER", str(tmp_path)).replace("RUN", f"run-{ranks}").replace("HOW", how)
        (tmp_path / "recipe.yaml").write_text(text)
        if ranks == 1:
            capture(load(tmp_path / "recipe.yaml"))
        on_ranks(ranks, SCRIPT, tmp_path, str(ranks), "2", "recipe", seconds=SECONDS)
        students.append(load_file(tmp_path / f"run-{ranks}" / "student" / "model.safetensors"))
        losses.append(json.loads((tmp_path / f"run-{ranks}" / "results.json").read_text())["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)
    assert students[0].keys() == students[1].keys()
    for name, weight in students[0].items():
        torch.testing.assert_close(students[1][name], weight, rtol=1e-4, atol=1e-6)


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "parts"), [(8, 2), (9, 2), (7, 4), (2, 4)])
def test_every_row_is_in_one_part(length: int, parts: int) -> None:
    labels = torch.arange(3 * length).view(3, length)
    labels[1] = -100
    whole = kept_rows(labels)
    found, read = [], []
    for number in range(parts):
        part = Part(number, parts)
        _, size = part.span(length)
        own = kept_rows(part.labels(labels))
        found += list(zip(own.index.tolist(), own.labels.tolist(), strict=True))
        cut = part.cut(labels)
        assert cut.shape == (3, size)
        local = part.rows(own, length)
        assert torch.equal(cut.flatten()[local.index], labels.flatten()[own.index])
        read.append(cut)
    assert sorted(found) == list(zip(whole.index.tolist(), whole.labels.tolist(), strict=True))
    assert torch.equal(torch.cat(read, 1)[:, :length], labels)


def test_a_row_of_another_part_is_refused() -> None:
    labels = torch.arange(8)[None]
    with pytest.raises(RuntimeError, match="a row of another rank's part"):
        Part(0, 2).rows(kept_rows(labels), 8)


def test_what_evaluates_reads_whole_sequences() -> None:
    model: Any = tiny_model(1).eval()
    batch = {"input_ids": torch.arange(1, 9)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    reader = view(model)
    assert isinstance(reader, Predictor)
    rows = kept_rows(batch["input_ids"])
    ours, theirs = PartReader(reader, Part(1, 2))(batch, rows), reader(batch, rows)
    assert torch.equal(ours.hidden, theirs.hidden)


# --- what is refused ------------------------------------------------------------------------------------------------


class _Anew(LogitKD):
    def losses(self, nets: Any, batch: Any, active: Any, step: Any) -> Any:
        return super().losses(nets, batch, active, step)


def test_methods_that_look_at_rows_say_so() -> None:
    assert all(method.by_rows for method in (LogitKD, Taid, SequenceKD, GKD))
    assert not any(method.by_rows for method in (HiddenKD, MiniLM, _Anew))


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process believe in a launch of two ranks that share sequences under DeepSpeed."""
    monkeypatch.setattr(cut_sequences, "ranks", lambda: 2)
    monkeypatch.setattr("kdlm.trainer.refuse_cuts", lambda args, student: None)
    monkeypatch.setattr("kdlm.deepspeed.refuse", lambda args, student: None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": HiddenKD([ForwardKL()])}, "HiddenKD looks at sequences as wholes"),
        ({"method": MiniLM()}, "MiniLM looks at sequences as wholes"),
        ({"method": _Anew([ForwardKL()])}, "_Anew looks at sequences as wholes"),
        ({"sizes": {"sp_size": 2, "dp_replicate_size": 2}}, "make 4 ranks, and there are 2: say dp_replicate_size: 1"),
        ({"data_collator": Collator(0, layout="padding_free")}, "batches have to be padded on the right"),
        ({"data_collator": lambda rows: rows}, "batches have to be padded on the right"),
        ({"teacher": SelfTeacher("current")}, "a SelfTeacher was never asked for parts"),
        ({"model": tiny_model(1, attn_implementation="eager")}, "LlamaForCausalLM: its attention is eager"),
    ],
)
def test_what_has_no_parts_is_refused(cut: None, arguments: Any, changes: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {
        **{"model": tiny_model(1), "teacher": tiny_model(2), "method": LogitKD([ForwardKL()]), "sizes": {"sp_size": 2}},
        **{"train_dataset": rows([4, 5]), "data_collator": Collator(0, layout="padded")},
        **changes,
    }
    args = arguments()
    args.parallelism_config = ParallelismConfig(**given.pop("sizes"))
    with pytest.raises(ValueError, match=said):
        DistillTrainer(args=args, **given)


def test_rollouts_are_refused(cut: None, arguments: Any) -> None:
    args = arguments()
    args.parallelism_config = ParallelismConfig(sp_size=2)
    method = GKD([ForwardKL()], student_share=0.5)
    networks = type("Nets", (), {"views": {"student": view(tiny_model(1))}})
    with pytest.raises(ValueError, match=r"sequence parallelism \(sp_size\): GKD needs rollouts"):
        cut_sequences.refuse_beside_parts(args, networks, LocalTeacher(tiny_model(2)), method, Collator(0))


def test_parts_without_deepspeed_are_refused(arguments: Any) -> None:
    args = arguments()
    args.parallelism_config = ParallelismConfig(sp_size=2)
    with pytest.raises(ValueError, match="sequence parallelism is DeepSpeed's, and without it"):
        DistillTrainer(tiny_model(1), None, args, method=SequenceKD([CrossEntropy()]), train_dataset=rows([4]))


def small(kind: Any, config: Any, **options: Any) -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(config(**sizes | options))


@pytest.mark.parametrize(
    ("made", "size", "said"),
    [
        (lambda: tiny_model(1), 4, "its 2 heads cannot be dealt out"),
        (lambda: small(GPT2LMHeadModel, GPT2Config), 2, "its None key-value heads cannot be dealt out"),
        (
            lambda: small(
                MistralForCausalLM,
                MistralConfig,
                num_key_value_heads=2,
                sliding_window=4,
            ),
            2,
            "it has layers that see other than all tokens before",
        ),
        (
            lambda: tiny_model(1, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            2,
            "its rotary embeddings depend on how long",
        ),
    ],
)
def test_architectures_that_cannot_be_cut_are_refused(made: Any, size: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"sequence parallelism .*{said}"):
        refuse_parts(made(), size)
    refuse_parts(tiny_model(1), 2)
