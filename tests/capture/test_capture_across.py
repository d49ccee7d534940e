"""A teacher's own reading of the text, captured for a student with another tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from finished import results, weights
from loopback import served, source
from scripted import openai_api, running

from kdlm.capture import capture
from kdlm.check import check
from kdlm.cli import main
from kdlm.recipe import load
from kdlm.sandbox import build
from kdlm.store import Store
from kdlm.train import train

RECIPE = """
student: {name: sandbox, model: code-student-tiny-unigram}
teacher:
  name: cached
  path: {FOLDER}/capture
  of: {name: sandbox, model: code-teacher-tiny}
  format: {name: logprobs}
  shard_mb: 0.02
data: {train: [{path: "sandbox:code/train", limit: 2}], max_length: 48, eval_rows: 1}
method: {name: alm}
losses: [{name: cross_entropy, weight: 0.2}]
training: {max_steps: 3, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 2,
           eval_strategy: steps, eval_steps: 3, use_cpu: true}
run_dir: {FOLDER}/run
"""
LIVE = "teacher={name: sandbox, model: code-teacher-tiny}"
SAME_TOKENIZER = ["student.model=code-student-tiny", "method={name: logit_kd}", "losses=[{name: forward_kl}]"]

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for model in ("code-teacher-tiny", "code-student-tiny", "code-student-tiny-unigram"):
        build(model)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{FOLDER}", str(tmp_path)))
    return path


def assert_same(ours: Path, other: Path) -> None:
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weights(other)[name], weight, rtol=1e-3, atol=1e-4)


def refusal(recipe: Path, *words: str, verb: str, capsys: Any) -> str:
    assert main([verb, str(recipe), *words]) != 0
    return capsys.readouterr().err


@pytest.mark.parametrize("packing", ["none", "pack"])
@pytest.mark.parametrize("format", ["{name: logprobs}", "{name: hidden, dtype: float32}"])
def test_it_trains_the_student_of_the_live_teacher(recipe: Path, tmp_path: Path, format: str, packing: str) -> None:
    """Captured from padded batches, read in packed ones."""
    kept, layout = f"teacher.format={format}", f"data.packing={packing}"
    capture(load(recipe, [kept]))
    live = train(load(recipe, [LIVE, layout, f"run_dir={tmp_path / 'live'}"]))
    cached = train(load(recipe, [kept, layout, f"run_dir={tmp_path / 'cached'}"]))
    assert_same(live, cached)
    for name in ("eval_alm", "eval_chunk_kl", "eval_bits_per_byte", "eval_teacher_bits_per_byte"):
        assert results(cached)[name] == pytest.approx(results(live)[name], rel=1e-4)


def test_worker_processes_read_the_same(recipe: Path, tmp_path: Path) -> None:
    capture(load(recipe))
    here = train(load(recipe))
    there = train(load(recipe, ["training.dataloader_num_workers=2", f"run_dir={tmp_path / 'workers'}"]))
    assert all(torch.equal(weights(here)[name], weight) for name, weight in weights(there).items())


def test_one_number_a_token_is_kept_of_the_teachers_own_tokens(recipe: Path) -> None:
    store = Store(capture(load(recipe)))
    assert store.bytes / store.rows < 4.5
    assert store.about.shared == store.about.vocab_size == 512, "all ids count, not those that are shared"


def test_a_second_capture_has_nothing_to_do_and_new_data_are_added(recipe: Path) -> None:
    """The tokenizer is opened from the capture then, and must be the same."""
    folder = capture(load(recipe, ["data.train.0.limit=1", "data.eval_rows=null"]))
    before = {path.name for path in folder.glob("*.index.safetensors")}
    capture(load(recipe, ["data.train.0.limit=1", "data.eval_rows=null"]))
    assert {path.name for path in folder.glob("*.index.safetensors")} == before
    capture(load(recipe))
    assert len(list(folder.glob("*.index.safetensors"))) > len(before)
    train(load(recipe))


def test_with_a_few_tokens_kept_the_share_of_chunks_that_are_left_out_is_said(recipe: Path, tmp_path: Path) -> None:
    left_out = {}
    for k in (8, 256):
        options = [f"teacher.format={{name: top_k, k: {k}, tail_draws: 0}}", f"teacher.path={tmp_path / str(k)}"]
        capture(load(recipe, options))
        left_out[k] = results(train(load(recipe, [*options, f"run_dir={tmp_path / f'run{k}'}"])))["eval_left_out"]
    assert 0 < left_out[256] < left_out[8] < 1


def test_tokens_that_were_drawn_are_refused_before_anything_is_captured(recipe: Path, capsys: Any) -> None:
    said = refusal(recipe, "teacher.format={name: sampled}", verb="check", capsys=capsys)
    assert "alm takes a signal of" in said and "this teacher gives Sampled" in said


def test_a_capture_of_the_students_reading_is_refused(recipe: Path, capsys: Any) -> None:
    """Made for a pair that shares its tokenizer; its sequences are others, whichever tokenizer made them."""
    other = ["teacher.format={name: hidden}"]
    capture(load(recipe, [*other, *SAME_TOKENIZER]))
    said = refusal(recipe, *other, verb="train", capsys=capsys)
    assert "does not hold" in said and "`kdlm capture` with this recipe adds what is missing" in said


def test_a_capture_of_the_teachers_reading_is_refused_by_a_method_on_the_students(recipe: Path, capsys: Any) -> None:
    kept = ["teacher.format={name: top_k, k: 8}"]
    capture(load(recipe, kept))
    said = refusal(recipe, *kept, *SAME_TOKENIZER, verb="train", capsys=capsys)
    assert "does not hold" in said


def test_other_lengths_are_refused_with_the_reason(recipe: Path, capsys: Any) -> None:
    capture(load(recipe))
    assert any("from" in line for line in check(load(recipe)) if line.startswith("teacher"))
    said = refusal(recipe, "data.max_length=40", verb="train", capsys=capsys)
    assert "max_length was 48 and is 40" in said


def test_a_server_that_scores_the_text_teaches_what_the_local_teacher_does(recipe: Path, tmp_path: Path) -> None:
    live = train(load(recipe, [LIVE, f"run_dir={tmp_path / 'live'}"]))
    of = "of: {name: sandbox, model: code-teacher-tiny}"
    with running(openai_api(source().load())) as url:
        asked = f"{{name: openai, url: '{url}', model: tiny, k: 0, {of}}}"
        direct = train(load(recipe, [f"teacher={asked}", f"run_dir={tmp_path / 'direct'}"]))
        from_server = [f"teacher.of={asked}", f"teacher.path={tmp_path / 'of server'}"]
        capture(load(recipe, from_server))
        few = asked.replace("k: 0", "k: 8")
        partly = train(load(recipe, [f"teacher={few}", f"run_dir={tmp_path / 'few'}"]))
    cached = train(load(recipe, [*from_server, f"run_dir={tmp_path / 'cached'}"]))
    assert_same(live, direct)
    assert_same(live, cached)
    assert results(direct)["eval_left_out"] == 0 < results(partly)["eval_left_out"] < 1


def test_a_teacher_behind_kdlm_serve_teaches_what_the_local_one_does(recipe: Path, tmp_path: Path) -> None:
    live = train(load(recipe, [LIVE, f"run_dir={tmp_path / 'live'}"]))
    with served(source().load()) as server:
        asked = f"{{name: served, url: '{server.url}', of: {{name: sandbox, model: code-teacher-tiny}}}}"
        direct = train(load(recipe, [f"teacher={asked}", f"run_dir={tmp_path / 'direct'}"]))
        workers = ["training.dataloader_num_workers=1", f"run_dir={tmp_path / 'workers'}"]
        beside = train(load(recipe, [f"teacher={asked}", *workers]))
    assert_same(live, direct)
    assert_same(live, beside)


def test_members_of_one_tokenizer_are_averaged_and_of_several_refused(
    recipe: Path, tmp_path: Path, capsys: Any
) -> None:
    one = "{name: sandbox, model: code-teacher-tiny}"
    alone = train(load(recipe, [LIVE, f"run_dir={tmp_path / 'live'}"]))
    both = train(load(recipe, [f"teacher={{name: ensemble, members: [{one}, {one}]}}", f"run_dir={tmp_path / 'two'}"]))
    assert_same(alone, both)
    other = "{name: sandbox, model: code-student-tiny-unigram}"
    gold = ["method={name: gold}", f"teacher={{name: ensemble, members: [{one}, {one}]}}"]
    said = refusal(recipe, *gold, verb="check", capsys=capsys)
    assert "method: gold takes a signal of Dense, Hidden; this teacher gives Mixture" in said
    check(load(recipe, [*gold, "teacher.space=log"]))
    said = refusal(recipe, f"teacher={{name: ensemble, members: [{one}, {other}]}}", verb="check", capsys=capsys)
    assert "teacher.members.1: has another tokenizer than teacher.members.0" in said


@pytest.mark.parametrize(
    ("teacher", "read"),
    [
        ("teacher.calibration={name: temperature}", "teacher_calibration"),
        ("teacher={name: ensemble, members: [OF, OF], weights: {name: learned}}", "teacher_weight/0"),
    ],
)
def test_what_a_teacher_learns_from_held_out_text_it_learns_from_its_own_reading(
    recipe: Path, teacher: str, read: str
) -> None:
    options = ["teacher.format={name: top_k, k: 8}", teacher.replace("OF", "{name: sandbox, model: code-teacher-tiny}")]
    if "calibration" in teacher:
        capture(load(recipe, options))
    run = train(load(recipe, options[1:] if "ensemble" in teacher else options))
    assert read in (run / "metrics.jsonl").read_text()


def test_a_teacher_that_names_no_tokenizer_is_refused(recipe: Path, capsys: Any) -> None:
    said = refusal(recipe, "teacher={name: custom, target: 'builtins:dict'}", verb="check", capsys=capsys)
    assert "teacher: alm reads the text as the teacher does, and custom does not say which tokenizer" in said
