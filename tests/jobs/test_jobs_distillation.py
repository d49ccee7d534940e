"""What a job says of distillation is what `kdlm.measuring` says, measured once."""

import json
from typing import Any

import pytest
from job_files import MODELS, job_in

from kdlm.data import load_data
from kdlm.jobs import distillation as room
from kdlm.jobs.running import distillation, evaluate
from kdlm.jobs.verb import run
from kdlm.measuring import measure
from kdlm.models import named

SETTINGS = 'distillation={data: [{path: "sandbox:code/eval", limit: 3}], max_length: 64, start: plain}'


def quiet(line: str) -> None:
    pass


def measured(job: Any) -> dict[str, Any]:
    return distillation(job, evaluate(job, quiet))


def test_figures_are_those_of_measuring_for_students_and_baselines(tmp_path):
    job = job_in(tmp_path, SETTINGS, tasks=())
    found = measured(job)
    assert set(found) == {"student", "plain"}
    student, teacher = (job.models[name].load(name)[0] for name in ("student", "teacher"))
    tokenizer = named(MODELS["student"]["path"]).tokenizer()
    data = load_data(job.distillation.rows(), tokenizer)
    alone = measure(student, teacher, data.train, tokenizer, documents=data.documents["train"])
    assert found["student"]["documents"] == alone["documents"] == 3
    for name, figure in alone["metrics"].items():
        assert found["student"]["metrics"][name] == pytest.approx(figure)
    assert found["plain"]["metrics"]["kl_to_start"]["value"] == pytest.approx(0, abs=1e-6)
    assert "baseline_cross_entropy" in found["student"]["metrics"]


def test_a_second_run_measures_nothing(tmp_path, monkeypatch):
    job = job_in(tmp_path, SETTINGS, tasks=())
    first = measured(job)
    monkeypatch.setattr(room, "measure", lambda *args, **options: pytest.fail("measured again"))
    assert measured(job) == first


def test_a_teacher_with_another_tokenizer_is_compared_as_far_as_that_goes(tmp_path):
    models = {**MODELS, "student": {"name": "hf", "path": "sandbox:code-student-tiny-unigram", "role": "student"}}
    found = measured(job_in(tmp_path, SETTINGS.replace(", start: plain", ""), models=models, tasks=()))
    assert "kl_to_teacher" not in found["student"]["metrics"] and "kl_to_teacher" in found["plain"]["metrics"]
    assert {"bits_per_byte", "teacher_bits_per_byte"} <= set(found["student"]["metrics"])
    assert any("tokenizer of its own" in note or "its own tokenizer" in note for note in found["student"]["notes"])


def test_the_results_and_the_table_have_it(tmp_path):
    job = job_in(tmp_path, SETTINGS, tasks=())
    run(job)
    found = json.loads((job.output / "results.json").read_text())["distillation"]
    assert found["student"]["reliability"]["student"]["count"]
    table = (job.output / "results.md").read_text()
    assert "| KL to the teacher, nats |" in table and "teacher_brier" not in table


@pytest.mark.parametrize(
    ("models", "settings", "said"),
    [
        ({"student": MODELS["student"]}, SETTINGS, "distillation: it is measured beside a teacher"),
        (MODELS, SETTINGS.replace("plain", "before"), "distillation.start: 'before' is no model"),
        (MODELS, SETTINGS.replace("sandbox:code/eval", "./nowhere.jsonl"), "distillation.data"),
    ],
)
def test_what_cannot_be_measured_is_said_with_its_key(tmp_path, models, settings, said):
    with pytest.raises(ValueError, match=said):
        measured(job_in(tmp_path, settings, models=models, tasks=()))
