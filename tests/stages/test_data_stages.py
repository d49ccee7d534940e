"""Stages that make rows or capture signals: read, looked at, run, stopped and handed over like those that train."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_stages import NAMES, dies_in, pipeline, staged, trained
from forks import CONTEXT, start
from four_stages import STUDENT, TEACHER, left_by, write

from kdlm import cli
from kdlm.sandbox import build
from kdlm.stages import check, load, running
from kdlm.stages.running import spelled_out


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    build("code-student-tiny")
    build("code-teacher-tiny")
    build("arithmetic")
    return staged(tmp_path / "run")


def read(tmp_path: Path, content: dict[str, Any], *changes: str):
    return load(write(tmp_path / "stages.yaml", content), changes)


def problems(tmp_path: Path, content: dict[str, Any], *changes: str) -> str:
    with pytest.raises(ValueError) as error:
        check(read(tmp_path, content, *changes))
    return str(error.value).replace(f"{tmp_path}/", "")


def test_rows_and_signals_are_named_like_a_student(tmp_path, content) -> None:
    stages: Any = read(tmp_path, content).by_name
    run = tmp_path / "run"
    assert stages["answers"].section.output == run / "answers"
    assert stages["signals"].recipe.teacher.path == run / "signals/store"
    assert stages["second"].takes == {
        "student.path": "first",
        "teacher.path": "signals",
        "data.train.0.path": "answers",
    }
    first = stages["first"].recipe
    assert first.data.train[0].path == str(run / "answers/rows.parquet")
    assert first.teacher.of.name == "sandbox" and first.teacher.format.k == 8  # as the capture says


def test_what_was_run_reads_back_as_the_same_run(tmp_path, content) -> None:
    run = read(tmp_path, content, "answers.seed=3")
    (tmp_path / "again.yaml").write_text(spelled_out(run))
    again = load(tmp_path / "again.yaml")
    assert [(one.section, one.takes, one.folder) for one in again.stages] == [
        (one.section, one.takes, one.folder) for one in run.stages
    ]
    assert "output" not in (tmp_path / "again.yaml").read_text()


def test_files_may_say_where_they_work_alone(tmp_path, content) -> None:
    asked = content["stages"][1]["capture"]
    asked["teacher"]["path"] = "captures/elsewhere"
    content["stages"][0]["pipeline"] = write(tmp_path / "p.yaml", pipeline() | {"output": "runs/elsewhere"}).name
    content["stages"][1]["capture"] = write(tmp_path / "c.yaml", asked | {"run_dir": "runs/elsewhere"}).name
    stages: Any = read(tmp_path, content).by_name
    assert stages["answers"].section.output == tmp_path / "run/answers"
    assert stages["signals"].recipe.teacher.path == tmp_path / "run/signals/store"


def test_a_change_reaches_recipes_and_a_seed_pipelines_too(tmp_path, content) -> None:
    stages: Any = read(tmp_path, content, "training.max_steps=3", "seed=5", "answers.sources.0.limit=2").by_name
    assert stages["answers"].section.sources[0].limit == 2
    assert [stages[name].section.seed for name in NAMES] == [5] * 4
    assert stages["signals"].recipe.training.max_steps == 3


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        (0, {"recipe": {}}, "stages.0: say one of recipe, pipeline and capture, not recipe and pipeline"),
        (0, {"pipeline": None}, "stages.0: say one of recipe, pipeline and capture, not none"),
        (0, {"carry": ["projectors"]}, "stages.0: carry: a pipeline trains no networks that could go on"),
        (0, {"pipeline": pipeline() | {"output": "x"}}, "output: is RUN_DIR/NAME in a run of stages: leave it out"),
        (0, {"set": {"output": "x"}}, "set.output: is RUN_DIR/NAME in a run of stages: leave it out"),
        (0, {"set": {"steps.0.by": "x"}}, "steps.0.by: no writer 'x'; there are: teacher"),
        (
            1,
            {"set": {"teacher.path": "x"}},
            "set.teacher.path: is RUN_DIR/NAME/store in a run of stages: leave it out",
        ),
        (1, {"set": {"teacher": TEACHER}}, "teacher: kdlm capture needs `teacher: {name: cached,"),
        (
            2,
            {"set": {"data.train.0.path": "stage:signals"}},
            "set.data.train.0.path: the stage 'signals' leaves signals of a teacher (`path` of a teacher `cached`), "
            "and here is meant rows",
        ),
        (3, {"set": {"data.train.0.path": "stage:first"}}, "the stage 'first' leaves a student (the path of a model)"),
        (3, {"set": {"student.path": "stage:answers"}}, "the stage 'answers' leaves rows (the path of a source)"),
        (3, {"set": {"teacher.format": {"name": "hidden"}}}, "set.teacher.format: stage:signals captures"),
        (2, {"set": {"data.train.0.columns": {"prompt": "p"}}}, "maps prompt to 'p', but its columns are"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path, content, stage, change, said) -> None:
    content["stages"][stage] |= change
    found = problems(tmp_path, content)
    assert said in found and "stages.yaml:" in found


def test_skipped_rows_are_missed_where_they_are_named(tmp_path, content) -> None:
    said = problems(tmp_path, content, "answers.skip=true")
    assert "stage first: stages.yaml:" in said
    assert "data.train.0.path: the stage 'answers' is skipped and leaves no rows.parquet: name a path" in said


def test_every_stage_is_looked_at_before_there_are_rows_and_signals(tmp_path, content) -> None:
    lines = check(read(tmp_path, content))
    assert "stage answers: sources: 6 rows" in lines
    assert any(line.startswith("stage answers: columns at the end: prompt, ") for line in lines)
    assert "stage signals: data: train: stage:answers (completion)" in lines
    assert "stage first: teacher: signals of stage:signals" in lines
    assert "stage second: tokenizers: 512 ids shared, identical" in lines
    assert not any("note: " in line or "not looked at" in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_rows_made_of_rows_that_are_not_there_yet_are_not_looked_at(tmp_path, content) -> None:
    again = pipeline() | {"sources": [{"path": "stage:answers", "columns": {"prompt": "prompt"}}]}
    content["stages"] = [content["stages"][0], {"name": "again", "pipeline": again}]
    lines = check(read(tmp_path, content))
    assert lines[-1] == "stage again: not looked at here (stage:answers: its rows are known when it has run)"


def test_the_plan_is_of_the_stages_that_train(tmp_path, content, capsys) -> None:
    file = write(tmp_path / "stages.yaml", content)
    assert cli.main(["plan", str(file), "--gpu", "80 GiB, 165 TFLOP/s, 1008 GB/s"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("stage answers: a pipeline, not planned here") and "stage first:" in said
    content["stages"] = content["stages"][:1]
    assert cli.main(["plan", str(write(file, content))]) == 2
    assert "stages: none of them trains" in capsys.readouterr().err


def test_a_run_is_resumed_reported_and_refused_when_its_rows_were_touched(tmp_path, content, capsys) -> None:
    file, run = write(tmp_path / "stages.yaml", content), tmp_path / "run"
    assert cli.main(["train", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"stage 2/4 signals: {run / 'signals'}, data of answers" in said
    results = json.loads((run / "results.json").read_text())["stages"]
    assert results["answers"]["rows"] == 6 and results["signals"]["sequences"] == 6
    assert results["second"]["steps"] == 2
    assert cli.main(["report", str(run), "--no-inspect", "-o", str(tmp_path / "report.html")]) == 0
    said = capsys.readouterr().out
    assert "stage answers: pipeline, 6 rows" in said and "stage signals: capture of " in said
    assert "2 runs" in said
    assert cli.main(["train", str(file), "--resume"]) == 0
    assert f"stage 1/4 answers: ended before, in {run / 'answers'}" in capsys.readouterr().out
    assert cli.main(["train", str(file), "--resume", "answers.sources.0.limit=5"]) == 2
    said = capsys.readouterr().err
    assert "stage answers: override 'sources.0.limit=5': 6 -> 5, but the stage has ended with the old value" in said
    assert ", ".join(str(run / name) for name in NAMES) in said
    with open(run / "answers/rows.parquet", "ab") as rows:
        rows.write(b" ")
    assert cli.main(["train", str(file), "--resume"]) == 2
    assert f"{run / 'answers/rows.parquet'}: changed since the stage left it" in capsys.readouterr().err


def test_a_writer_may_be_the_student_of_an_earlier_stage(tmp_path, content) -> None:
    learnt = trained(STUDENT, TEACHER)
    learnt["data"]["train"] = [{"path": "sandbox:arithmetic/train", "limit": 4}]
    rows = pipeline(2)
    rows["writers"]["teacher"] = {"name": "local", "path": "stage:own"}
    healed = trained(left_by("own"), TEACHER)
    content["stages"] = [
        {"name": "own", "recipe": learnt},
        {"name": "answers", "pipeline": rows},
        {"name": "healed", "recipe": healed},
    ]
    file, run = write(tmp_path / "stages.yaml", content), tmp_path / "run"
    assert not any("not looked at" in line for line in check(load(file)))
    assert cli.main(["train", str(file)]) == 0
    record = json.loads((run / "answers/stage.json").read_text())
    own = json.loads((run / "healed/stage.json").read_text())["takes"]["student.path"]
    assert record["takes"] == {"writers.teacher.path": own} and list(record["leaves"]) == ["rows.parquet"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_rank_waits_for_the_rows_of_the_first(tmp_path, content, monkeypatch) -> None:
    content["stages"] = content["stages"][:1]
    file, run = write(tmp_path / "stages.yaml", content), tmp_path / "run"
    first = start("train", str(file))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(running, "generate", lambda *_: pytest.fail("a second rank makes rows"))
    assert cli.main(["train", str(file)]) == 0
    assert json.loads((run / "answers/stage.json").read_text())["leaves"]
    first.join()
    assert first.exitcode == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_in_rows_and_in_signals_leaves_no_trace_in_the_files(tmp_path, content) -> None:
    whole = tmp_path / "whole"
    assert cli.main(["train", str(write(tmp_path / "whole.yaml", staged(whole)))]) == 0
    file, run = write(tmp_path / "stages.yaml", content), tmp_path / "run"
    words: list[str] = []
    for stage in ("answers", "signals"):
        process = CONTEXT.Process(target=dies_in, args=(stage, "train", str(file), *words))
        process.start()
        process.join()
        assert process.exitcode == -9, stage
        assert json.loads((run / stage / "stage.json").read_text())["leaves"] is None, stage
        words = ["--resume"]
    assert len(list((run / "signals/store").glob("*.index.safetensors"))) == 1
    last = start("train", str(file), "--resume")
    last.join()
    assert last.exitcode == 0
    for stage in NAMES:
        left = [json.loads((folder / stage / "stage.json").read_text())["leaves"] for folder in (whole, run)]
        for leaves, folder in zip(left, (whole, run), strict=True):
            if leaves.pop("store/capture.json", None):  # it tells where the rows lay
                about = (folder / stage / "store/capture.json").read_text()
                leaves["about"] = about.replace(str(folder), "RUN_DIR")
        assert left[0] == left[1] and left[0], stage
