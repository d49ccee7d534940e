"""From `kdlm train` to the page: what a real run measured is what its report says."""

import json
import re

import pytest

from kdlm.recipe import load
from kdlm.report import read_run, writing
from kdlm.report.writing import report
from kdlm.train import train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 2}], eval: [{path: "sandbox:code/eval", limit: 2}], max_length: 32}
method: {name: logit_kd}
losses: [{name: forward_kl}]
training: {max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1, eval_strategy: steps, eval_steps: 1,
           save_strategy: "no", use_cpu: true}
run_dir: RUN
"""


def test_the_heat_map_of_a_run_has_the_numbers_of_its_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "bundle", lambda: "/* vega */")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("RUN", str(tmp_path / "run")))
    folder = train(load(tmp_path / "recipe.yaml"))
    (line,) = report([folder], tmp_path / "report.html")
    assert line.endswith("1 run)")
    page = (tmp_path / "report.html").read_text()
    data = json.loads(re.search(r'id="token-data">(.*?)</script>', page)[1])
    metrics = json.loads((folder / "inspection.json").read_text())["measured"]["metrics"]
    tokens = [token[1] for text in data["runs"][0] for token in text if token]
    for at, name in enumerate(("kl_to_teacher", "reverse_kl_to_teacher", "cross_entropy")):
        mean = sum(values[at] for values in tokens) / len(tokens)
        assert mean == pytest.approx(metrics[name]["value"], rel=1e-4), name
    specs = json.loads(re.search(r'id="specs">(.*?)</script>', page)[1])
    logged = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    drawn = [(row["step"], row["value"]) for row in specs["curves/kl_to_teacher"]["data"]["values"]]
    assert drawn == [(each["step"], each["eval_kl_to_teacher"]) for each in logged if "eval_kl_to_teacher" in each]
    assert specs["resources/memory_gib"]["data"]["values"] and "reliability/run" in specs
    assert read_run(folder).notes == []
