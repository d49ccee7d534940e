"""The record of a finished run, token by token: its means are the figures, and it is kept until something changes."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from kdlm.finished_run import open_run
from kdlm.inspection import inspect_run
from kdlm.measuring import measure
from kdlm.recipe import load
from kdlm.sandbox import build
from kdlm.train import train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 32, eval_rows: 1}
method: {name: logit_kd}
losses: [{name: forward_kl}]
training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 0.01, use_cpu: true, report_to: none}
run_dir: {RUN}
"""


def ran(folder: Path, *overrides: str) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("{RUN}", str(folder / "run")))
    return train(load(recipe, overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ran(tmp_path_factory.mktemp("inspected"))


def means(found: dict, name: str) -> float:
    values = [token[name] for text in found["texts"] for token in text["tokens"] if token["kept"]]
    return sum(values) / len(values)


def test_the_means_of_the_tokens_are_the_figures_of_the_texts(folder):
    found = inspect_run(folder, texts=5)
    run = open_run(folder)
    numbers = {int(text["place"].split()[-1]) for text in found["texts"]}
    rows = [row for row in run.data.eval if int(row["index"]) in numbers]
    measured = measure(run.student, run.teacher, rows, run.tokenizer, collate=run.data.collator)
    assert len(found["texts"]) == len(rows) == 5
    for name in ("cross_entropy", "kl_to_teacher", "reverse_kl_to_teacher"):
        value = measured["metrics"][name]["value"]
        assert means(found, name) == pytest.approx(value, rel=1e-6)
        assert found["measured"]["metrics"][name]["value"] == pytest.approx(value, rel=1e-6)
    assert found["measured"]["tokens"] == measured["tokens"]
    assert (found["student"], found["teacher"]) == (str(folder / "student"), "sandbox:code-teacher-tiny")


def test_figures_of_all_evaluation_rows_are_those_that_the_run_logged(folder):
    logged, run = json.loads((folder / "results.json").read_text()), open_run(folder)
    found = measure(run.student, run.teacher, run.data.eval, run.tokenizer, collate=run.data.collator, batch_size=32)
    assert found["tokens"] > 1000
    for name in ("cross_entropy", "kl_to_teacher", "top1_agreement", "teacher_cross_entropy", "student_entropy"):
        assert found["metrics"][name]["value"] == pytest.approx(logged[f"eval_{name}"], rel=1e-5)


def test_tokens_are_those_of_the_text_with_what_both_expect(folder):
    found = inspect_run(folder, texts=3, top=4)
    run = open_run(folder)
    for text in found["texts"]:
        row = next(row for row in run.data.eval if int(row["index"]) == int(text["place"].split()[-1]))
        assert [token["text"] for token in text["tokens"]] == [run.tokenizer.decode([i]) for i in row["input_ids"]]
        first, *others = text["tokens"]
        assert first == {"text": first["text"], "kept": False}
        for token in others:
            assert token["kept"] and len(token["student"]) == len(token["teacher"]) == 4
            for side in ("student", "teacher"):
                p = [value for _, value in token[side]]
                assert p == sorted(p, reverse=True) and 0 < sum(p) <= 1.001


def test_it_is_kept_until_the_student_or_the_question_changes(folder, tmp_path, monkeypatch):
    found = inspect_run(folder, texts=2)
    assert json.loads((folder / "inspection.json").read_text()) == found
    monkeypatch.setattr("kdlm.inspection.open_run", None)
    assert inspect_run(folder, texts=2) == found
    with pytest.raises(TypeError):  # made again, which it cannot be here
        inspect_run(folder, texts=1)
    (folder / "inspection.json").write_text("[]")  # of somebody else
    with pytest.raises(TypeError):
        inspect_run(folder, texts=2)
    weights = folder / "student" / "model.safetensors"
    before = weights.read_bytes()
    try:
        AutoModelForCausalLM.from_pretrained(build("code-student-tiny")).save_pretrained(folder / "student")
        with pytest.raises(TypeError):
            inspect_run(folder, texts=2)
    finally:
        weights.write_bytes(before)


def test_long_texts_are_looked_at_from_their_beginning(folder):
    short, whole = (inspect_run(folder, texts=2, length=length) for length in (9, 512))
    for beginning, text in zip(short["texts"], whole["texts"], strict=True):
        assert len(beginning["tokens"]) == 9
        for ours, theirs in zip(beginning["tokens"], text["tokens"], strict=False):
            assert ours == theirs
    assert short["measured"]["tokens"] == 16
    assert means(short, "kl_to_teacher") == pytest.approx(
        short["measured"]["metrics"]["kl_to_teacher"]["value"], rel=1e-6
    )


@pytest.mark.parametrize("change", ["data.packing=pack", "student.lora={rank: 2, export: adapter}"])
def test_packed_rows_and_an_adapter_are_opened_as_they_are(tmp_path, change):
    path = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"def f{n}(x):\n", "completion": f"    return {'x + ' * (n % 7)}{n}\n"} for n in range(20)]
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    folder = ran(tmp_path, f"data={{train: [{{path: {path}}}], max_length: 64, eval_rows: 8}}", change)
    found = inspect_run(folder, texts=100, top=1)
    run = open_run(folder)
    names = ["cross_entropy", "kl_to_teacher"]
    every = measure(run.student, run.teacher, run.data.eval, run.tokenizer, names=names, collate=run.data.collator)
    assert found["measured"]["tokens"] == every["tokens"]
    assert len(found["texts"]) == 8
    assert not all(token["kept"] for token in found["texts"][0]["tokens"][1:])  # of the prompt
    for name in names:
        assert means(found, name) == pytest.approx(every["metrics"][name]["value"], rel=1e-6)


def test_without_a_teacher_there_is_what_there_is(tmp_path):
    folder = ran(tmp_path, "teacher=null", "losses=[{name: cross_entropy}]", "data.eval_rows=null")
    found = inspect_run(folder, texts=2)
    assert found["teacher"] is None and "held out" not in found["texts"][0]["place"]
    token = found["texts"][0]["tokens"][1]
    assert set(token) == {"text", "kept", "cross_entropy", "student"}


def test_across_tokenizers_the_student_is_shown_and_bytes_are_compared(tmp_path):
    change = ["student.model=code-student-tiny-unigram", "method.name=alm", "losses=[]", "data.max_length=64"]
    found = inspect_run(ran(tmp_path, *change), texts=2, top=2)
    tokens = [token for text in found["texts"] for token in text["tokens"] if token["kept"]]
    assert all(set(token) == {"text", "kept", "cross_entropy", "student"} for token in tokens)
    figures = found["measured"]["metrics"]
    assert means(found, "cross_entropy") == pytest.approx(figures["cross_entropy"]["value"], rel=1e-6)
    assert figures["teacher_bits_per_byte"]["value"] > 1 and "kl_to_teacher" not in figures
    assert "its own tokenizer" in found["measured"]["notes"][0]


def test_what_is_no_finished_run_of_text_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="no finished run"):
        inspect_run(tmp_path)
    images = tmp_path / "images"
    (images / "student").mkdir(parents=True)
    recipe = Path(__file__).parents[2] / "recipes" / "diffusion"
    described = next(iter(sorted(recipe.glob("*.yaml"))))
    (images / "recipe.yaml").write_text(described.read_text())
    with pytest.raises(ValueError, match="trains no language model"):
        inspect_run(images)
