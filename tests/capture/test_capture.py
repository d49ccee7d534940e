"""A capture from its recipe to the student that it trains, through the command line's own functions."""

import json
import random
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from finished import results, weights
from forks import start
from loopback import served, source

import kdlm.capture
import kdlm.train
from kdlm.capture import capture
from kdlm.check import check
from kdlm.cli import main
from kdlm.recipe import load
from kdlm.sandbox import build
from kdlm.store import Store
from kdlm.train import train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher:
  name: cached
  path: {FOLDER}/capture
  of: {name: sandbox, model: code-teacher-tiny}
  format: {name: top_k, k: 32}
  shard_mb: 0.05
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 32, eval_rows: 1}
method: {name: logit_kd}
losses: [{name: forward_kl}]
training: {max_steps: 6, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 2,
           eval_strategy: steps, eval_steps: 6, use_cpu: true}
run_dir: {FOLDER}/run
"""
LIVE = "teacher={name: sandbox, model: code-teacher-tiny}"
HIDDEN = "teacher.format={name: hidden, dtype: float32}"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    build("code-teacher-tiny"), build("code-student-tiny")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{FOLDER}", str(tmp_path)))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("packing", ["none", "pack", "padding_free"])
def test_hidden_in_float32_trains_the_student_of_the_live_teacher(recipe: Path, tmp_path: Path, packing: str) -> None:
    """Captured from padded batches, read in packed ones: a sequence is known by its tokens."""
    capture(load(recipe, [HIDDEN]))
    layout = f"data.packing={packing}"
    live = train(load(recipe, [LIVE, layout, f"run_dir={tmp_path / 'live'}"]))
    cached = train(load(recipe, [HIDDEN, layout, f"run_dir={tmp_path / 'cached'}"]))
    for name, weight in weights(live).items():
        torch.testing.assert_close(weights(cached)[name], weight, rtol=1e-4, atol=1e-6)
    assert results(cached)["eval_kl_to_teacher"] == pytest.approx(results(live)["eval_kl_to_teacher"], rel=1e-4)


def test_worker_processes_read_the_same(recipe: Path, tmp_path: Path) -> None:
    capture(load(recipe))
    here = train(load(recipe))
    there = train(load(recipe, ["training.dataloader_num_workers=2", f"run_dir={tmp_path / 'workers'}"]))
    assert all(torch.equal(weights(here)[name], weight) for name, weight in weights(there).items())


@pytest.mark.parametrize(
    ("format", "bound"),
    [
        ("{name: hidden}", 0.02),
        ("{name: hidden, dtype: float8}", 0.05),
        ("{name: top_k, k: 256}", 0.03),
        ("{name: sampled, draws: 50}", 0.5),
    ],
)
def test_every_format_teaches_nearly_the_same(recipe: Path, tmp_path: Path, format: str, bound: float) -> None:
    steps = ["training.max_steps=30", "training.eval_steps=30"]
    live = train(load(recipe, [LIVE, f"run_dir={tmp_path / 'live'}", *steps]))
    capture(load(recipe, [f"teacher.format={format}"]))
    cached = train(load(recipe, [f"teacher.format={format}", *steps]))
    assert results(cached)["eval_cross_entropy"] == pytest.approx(results(live)["eval_cross_entropy"], rel=bound)


def test_every_divergence_runs_on_top_k(recipe: Path, tmp_path: Path) -> None:
    capture(load(recipe))
    for name in ("reverse_kl", "jsd", "tvd", "skew_kl"):
        loss = [f"losses=[{{name: {name}}}]", "training.max_steps=2", f"run_dir={tmp_path / name}"]
        assert results(train(load(recipe, loss)))["eval_loss"] > 0
    taid = ["method={name: taid}", "losses=[]", "training.max_steps=2", f"run_dir={tmp_path / 'taid'}"]
    assert results(train(load(recipe, taid)))["eval_loss"] > 0


def test_a_second_capture_has_nothing_to_do_and_loads_no_model(recipe: Path, monkeypatch, capsys) -> None:
    folder = capture(load(recipe))
    before = files(folder)
    monkeypatch.setattr(kdlm.capture, "Observer", None)
    capture(load(recipe))
    assert files(folder) == before
    assert "bytes a token" in capsys.readouterr().out


def test_new_data_are_added_and_old_ones_are_not_captured_again(recipe: Path) -> None:
    folder = capture(load(recipe, ["data.train.0.limit=2"]))
    before, rows = files(folder), Store(folder).rows
    capture(load(recipe))
    after = files(folder)
    assert after.keys() > before.keys() and all(after[name] == content for name, content in before.items())
    store = Store(folder)
    keys = {bytes(key) for shard in store.shards for key in shard.keys}
    assert len(keys) == len(store) and store.rows > rows
    assert len(store.about.data) == 2
    train(load(recipe))


def begun(recipe: Path) -> BaseProcess:
    return start("capture", str(recipe), f"teacher.path={recipe.parent / 'killed'}")


def test_ten_kills_leave_no_trace_in_the_shards(recipe: Path, tmp_path: Path) -> None:
    """Killed at ten random moments, wherever that is: while it writes a shard, an index, the description."""
    whole = capture(load(recipe))
    killed, chance = tmp_path / "killed", random.Random(5)
    kills = 0
    while kills < 10:
        process = begun(recipe)
        target = min(kills * 3, 25)
        while process.is_alive() and len(list(killed.glob("*.index.safetensors"))) < target:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
        for index in killed.glob("*.index.safetensors"):  # whatever is sealed is whole
            Store(killed).shards[0].verify()
            assert index.with_name(index.name.replace(".index", "")).is_file()
    assert kills == 10
    process = begun(recipe)
    process.join()
    assert process.exitcode == 0
    assert files(killed) == files(whole)


def test_two_processes_share_the_work_and_leave_what_one_does(recipe: Path, tmp_path: Path) -> None:
    whole = capture(load(recipe))
    both = [begun(recipe), begun(recipe)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert files(tmp_path / "killed") == files(whole)


def refusal(recipe: Path, *overrides: str, verb: str = "train", capsys) -> str:
    capsys.readouterr()
    assert main([verb, str(recipe), *overrides]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_data_of_other_settings_are_refused_with_the_reason(recipe: Path, tmp_path: Path, capsys) -> None:
    capture(load(recipe))
    said = refusal(recipe, "data.max_length=48", capsys=capsys)
    assert "does not hold" in said and "max_length was 32 and is 48" in said and not (tmp_path / "run").exists()
    said = refusal(recipe, "data.train.0.limit=5", capsys=capsys)
    assert "no sequence with these tokens" in said and "kdlm capture" in said
    assert any("max_length was 32 and is 48" in line for line in check(load(recipe, ["data.max_length=48"])))


def test_chats_of_another_template_are_refused_with_the_reason(recipe: Path, tmp_path: Path, capsys) -> None:
    chat = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    rows = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"it is {n}"}] for n in range(20)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    template = tmp_path / "one.jinja"
    template.write_text(chat)
    data = f"data={{train: [{{path: {tmp_path / 'chat.jsonl'}}}], loss_on: all, chat_template: {template}}}"
    plain = [data, "training.eval_strategy=no"]
    capture(load(recipe, plain))
    train(load(recipe, [*plain, "training.max_steps=1"]))
    template.write_text(chat.replace(": ", " says "))
    said = refusal(recipe, *plain, f"run_dir={tmp_path / 'other'}", capsys=capsys)
    assert "does not hold 20 of these 20 sequences" in said and "chat_template was" in said


def test_a_capture_of_another_tokenizer_is_refused_by_check_and_train(recipe: Path, tmp_path: Path, capsys) -> None:
    folder = capture(load(recipe))
    about = json.loads((folder / "capture.json").read_text())
    (folder / "capture.json").write_text(json.dumps(about | {"tokenizer": "of somebody else"}))
    for verb in ("check", "train"):
        said = refusal(recipe, verb=verb, capsys=capsys)
        assert "recipe.yaml:5: teacher.path:" in said and "another tokenizer" in said


def test_a_folder_is_not_mixed_with_another_capture(recipe: Path, capsys) -> None:
    capture(load(recipe))
    said = refusal(recipe, "teacher.format.k=16", "data.train.0.limit=5", verb="capture", capsys=capsys)
    assert "holds another capture: format was" in said and "choose another folder" in said
    other = "teacher.of.model=code-teacher-tiny-padded"
    said = refusal(recipe, other, "data.train.0.limit=5", verb="capture", capsys=capsys)
    assert "holds another capture: weights was" in said


def test_a_padded_teacher_is_captured_over_the_ids_that_are_shared(recipe: Path, tmp_path: Path) -> None:
    plain = train(load(recipe, [LIVE, f"run_dir={tmp_path / 'plain'}"]))
    padded = ["teacher.of.model=code-teacher-tiny-padded", HIDDEN]
    capture(load(recipe, padded))
    cached = train(load(recipe, padded))
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(cached)[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.format={name: sampled}", "losses=[{name: reverse_kl}]"], "losses.0: reverse_kl takes a signal of"),
        (["teacher.format={name: logprobs}"], "losses.0: forward_kl takes a signal of"),
        (["teacher.format={name: sampled}", "method={name: taid}", "losses=[]"], "method: taid takes a signal of"),
        (
            ["method={name: minillm}", "losses=[]"],
            "method: minillm takes a signal of Dense, Hidden, Mixture;",
        ),
        (
            ["losses.0.temperature=2"],
            "losses.0.temperature: 2, but this teacher knows a few tokens at temperature 1 only",
        ),
        (["method={name: hidden_kd}"], "cached does not provide teacher.layers"),
    ],
)
def test_check_refuses_what_a_format_cannot_serve(recipe: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        check(load(recipe, overrides))


def test_training_before_the_capture_says_what_comes_first(recipe: Path, capsys) -> None:
    assert "is not captured yet" in "\n".join(check(load(recipe)))
    assert "there is no capture here; make it with `kdlm capture`" in refusal(recipe, capsys=capsys)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([LIVE], "kdlm capture needs `teacher: {name: cached"),
        (["teacher.of=null"], "teacher.of: missing"),
        (["data.streaming=true", "data.eval_rows=null"], "a stream may never end"),
        (["teacher.format.k=4000"], "teacher.format.k: 4000 of 512 shared ids"),
    ],
)
def test_what_cannot_be_captured_is_refused(recipe: Path, overrides: list[str], said: str, capsys) -> None:
    assert said in refusal(recipe, *overrides, verb="capture", capsys=capsys)


def test_a_damaged_shard_ends_the_run_with_its_name(recipe: Path, capsys) -> None:
    folder = capture(load(recipe))
    for path in folder.glob("*.safetensors"):
        if ".index" not in path.name:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    assert "this shard is damaged" in refusal(recipe, capsys=capsys)


def test_logprobs_are_written_and_read(recipe: Path) -> None:
    folder = capture(load(recipe, ["teacher.format={name: logprobs}"]))
    store = Store(folder)
    shard = store.shards[0]
    columns, rows = shard.columns(0)
    assert columns["log_probs"].shape == (rows,) and (columns["log_probs"] < 0).all()


def test_a_calibration_is_chosen_on_evaluation_rows_and_survives_a_resume(recipe: Path, tmp_path: Path) -> None:
    top5 = ["teacher.format={name: top_k, k: 5}", "teacher.calibration={name: temperature}"]
    capture(load(recipe, top5))
    whole = train(load(recipe, [*top5, "training.save_steps=3"]))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    (chosen,) = [line["teacher_calibration"] for line in lines if "teacher_calibration" in line]
    assert chosen > 0
    said = train(load(recipe, [*top5, f"teacher.calibration.value={chosen}", f"run_dir={tmp_path / 'said'}"]))
    assert all(torch.equal(weights(said)[name], weight) for name, weight in weights(whole).items())
    for name in ("checkpoint-6", "student"):  # as if it had been killed after its first checkpoint
        shutil.rmtree(whole / name)
    train(load(recipe, [*top5, "training.save_steps=3"]), resume=True)
    assert all(torch.equal(weights(said)[name], weight) for name, weight in weights(whole).items())


def test_a_calibration_without_evaluation_rows_or_top_tokens_is_refused(recipe: Path, capsys) -> None:
    capture(load(recipe))
    calibration = "teacher.calibration={name: label_smoothing}"
    said = refusal(recipe, calibration, "data.eval_rows=null", "training.eval_strategy=no", capsys=capsys)
    assert "evaluation rows, and there are none" in said
    said = refusal(recipe, calibration, HIDDEN, verb="check", capsys=capsys)
    assert "hidden has no top tokens to re-calibrate; use format top_k" in said


def test_a_served_teacher_is_captured_like_a_local_one(recipe: Path, tmp_path: Path) -> None:
    capture(load(recipe, [HIDDEN]))
    with served(source().load()) as server:
        of = f"teacher.of={{name: served, url: '{server.url}', of: {{name: sandbox, model: code-teacher-tiny}}}}"
        there = capture(load(recipe, [HIDDEN, of, f"teacher.path={tmp_path / 'there'}"]))
    ours, theirs = Store(tmp_path / "capture"), Store(there)
    assert ours.rows == theirs.rows
    for mine, other in zip(ours.shards, theirs.shards, strict=True):
        assert mine.path.name == other.path.name
        a, b = mine.columns(0)[0]["hidden"], other.columns(0)[0]["hidden"]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.head().weight, theirs.head().weight)


def test_what_of_gives_must_do_for_the_format(recipe: Path, capsys) -> None:
    openai = "{name: openai, url: 'http://127.0.0.1:9', model: m, k: 20, of: {name: sandbox, model: code-teacher-tiny}}"
    said = refusal(recipe, f"teacher.of={openai}", HIDDEN, verb="check", capsys=capsys)
    assert "hidden cannot be made of TopK, which is all that `of` gives" in said
    said = refusal(recipe, f"teacher.of={openai}", verb="check", capsys=capsys)
    assert "32 tokens of a teacher that gives 20; raise `of.k`" in said
