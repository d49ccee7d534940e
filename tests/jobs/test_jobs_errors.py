"""What is wrong with a job is said in one line with its place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from job_files import TEACHER, job_in

from kdlm import cli

HERE = {"m": {"name": "hf", "path": TEACHER}}


def failed(folder: Path, capsys, *overrides: str) -> str:
    """Run the job of a folder and return what it says, with its line's key checked."""
    capsys.readouterr()
    assert cli.main(["eval", str(folder / "job.yaml"), *overrides]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if found := re.match(r".*job\.yaml:(\d+): ([\w.-]+):", said):
        line = (folder / "job.yaml").read_text().splitlines()[int(found[1]) - 1]
        assert any(part in line for part in found[2].split("."))
    return said


def test_a_task_that_there_is_not_is_said_with_what_was_meant(tmp_path, capsys):
    job_in(tmp_path, models=HERE, tasks=["tiny_choise", "tiny_choice", "helaswag"])
    said = failed(tmp_path, capsys)
    assert "tasks.tiny_choise: no such task, did you mean tiny_choice?" in said
    assert "tasks.helaswag: no such task, did you mean hellaswag?" in said
    assert len(said.splitlines()) == 2 and all(line.startswith(str(tmp_path)) for line in said.splitlines())


def test_a_task_that_runs_code_wants_consent(tmp_path, capsys):
    job_in(tmp_path, models=HERE, tasks=["tiny_choice"])
    path = tmp_path / "tasks" / "tiny_choice.yaml"
    path.write_text(path.read_text() + "unsafe_code: true\n")
    assert "tasks.tiny_choice: it runs what a model wrote" in failed(tmp_path, capsys)


def test_examples_that_the_task_forbids_are_refused(tmp_path, capsys):
    job_in(tmp_path, models=HERE, tasks={"tiny_choice": {"num_fewshot": 3}})
    path = tmp_path / "tasks" / "tiny_choice.yaml"
    path.write_text(path.read_text() + "num_fewshot: 0\n")
    assert "tasks.tiny_choice.num_fewshot: 3, and the task's file fixes 0" in failed(tmp_path, capsys)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("include_path=[nowhere]", "include_path.0: nowhere: no such folder"),
        ("models.m.path=./nowhere", "models.m.path: ./nowhere: no such model folder"),
        ("models.m.path=runs/a/student", "models.m.path: runs/a/student"),
        ("models.m.path=sandbox:code-taecher", "the sandbox has no model 'code-taecher', did you mean code-teacher?"),
        ("models.m.rol=student", "models.m.rol=student': unknown key, did you mean role?"),
        ("models.m.name=hg", "models.m.name=hg': unknown model 'hg'. One of: hf, vllm, server"),
        ("tasks.tiny_choice={limits: 3}", "tasks.tiny_choice.limits: unknown key, did you mean limit?"),
        ("tasks={}", "nothing to do: give tasks, distillation, or speed"),
        ("models={}", "must have at least 1 item"),
        ("limit=0", "must be greater than or equal to 1"),
    ],
)
def test_bad_input_is_said_in_one_line(tmp_path, capsys, override, said):
    job_in(tmp_path, models=HERE, tasks=["tiny_choice"])
    assert said in failed(tmp_path, capsys, override)


def test_data_of_the_hub_without_the_hub_are_said_with_the_task(tmp_path, capsys):
    job_in(tmp_path, models=HERE, tasks=["tiny_choice", "tiny_answer"])
    path = tmp_path / "tasks" / "tiny_answer.yaml"
    path.write_text(path.read_text().replace("dataset_path: json", "dataset_path: somebody/something"))
    said = failed(tmp_path, capsys)
    assert "tasks.tiny_answer: its data are not here and cannot be had" in said and "HF_HUB_OFFLINE" in said


def test_a_device_that_there_is_not_is_said_with_its_key(tmp_path, capsys):
    job_in(tmp_path, models=HERE, tasks=["tiny_choice"])
    assert "models.m.device: " in failed(tmp_path, capsys, "models.m.device=cuda:77")


def test_vllm_that_is_not_installed_is_said_with_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "lm_eval.models.vllm_causallms", raising=False)
    job_in(tmp_path, models={"m": {"name": "vllm", "path": TEACHER}}, tasks=["tiny_choice"])
    said = failed(tmp_path, capsys)
    assert "models.m: vllm cannot be imported" in said and "pip install 'kdlm[vllm]'" in said


def test_without_the_harness_it_is_said_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    job_in(tmp_path, models=HERE, tasks=["tiny_choice"])
    assert "pip install 'kdlm[eval]'" in failed(tmp_path, capsys)


def test_reading_a_job_does_not_import_the_harness():
    code = "import sys, kdlm.jobs, kdlm.jobs.verb; print('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
