"""The page holds all it needs, lets nothing of a run become markup, and leaves out what is not there."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from run_folders import BASELINE, SOURCE, inspection, lines, write_inspected, write_run

from kdlm.cli import main
from kdlm.report import pictures, read_runs, writing
from kdlm.report.markup import element, script_data, visible
from kdlm.report.page import page

ROOT = Path(__file__).parents[2]
EVIL = '</script><img src=x onerror="alert(1)">&amp;\u202e\x07'
JOB = {
    "models": {"student": {"role": "student"}, "plain": {"role": "baseline"}},
    "tasks": {
        "kdlm_arithmetic": {
            "samples": 200,
            "metrics": {
                "exact_match": {
                    "higher_is_better": True,
                    "models": {"student": {"value": 0.5, "error": 0.02}, "plain": {"value": 0.25, "error": None}},
                    "against_baseline": {"student": {"difference": 0.25, "error": 0.03, "p_value": 0.001}},
                }
            },
        }
    },
    "speed": {"student": {"bytes": 9, "batch": {"4": {"decode_tokens_per_second": {"value": 812.5, "error": 3.0}}}}},
    "distillation": {"student": {"metrics": {"kl_to_teacher": {"value": 0.125, "error": 0.01}}}},
}


def of(*folders, jobs=None):
    return page(read_runs(folders), "/* vega */", jobs)


def sections(text):
    return dict(re.findall(r'<section id="([^"]+)".*?>(.*?)</section>', text, re.DOTALL))


def test_the_page_asks_for_nothing_and_forbids_it(tmp_path):
    text = of(write_inspected(tmp_path / "kl"))
    assert not re.search(r'(src|href)="(?!#)', text) and "url(" not in text and "@import" not in text
    addresses = set(re.findall(r"https?://[^\"'\s<]+", text))
    assert addresses == {"https://vega.github.io/schema/vega-lite/v6.json"}  # a name, which is not fetched
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    inline = re.findall(r"<script(?: type=\"module\")?>(.*?)</script>|<style>(.*?)</style>", text, re.DOTALL)
    for script, style in inline:
        digest = base64.b64encode(hashlib.sha256((script or style).encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert len(inline) == 4


def test_the_words_come_before_the_figures_and_the_scripts(tmp_path):
    text = of(write_inspected(tmp_path / "kl"), write_run(tmp_path / "ce", **BASELINE))
    places = [
        text.index(mark)
        for mark in ('class="verdict"', "Held-out figures", 'role="listbox"', "data-figure", "<script>")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("place", ["name", "student", "source", "example", "reading", "text", "environment"])
def test_nothing_of_a_run_becomes_markup(tmp_path, place):
    log = [line | {EVIL: 1.0} for line in lines()] if place == "reading" else None
    recipe = {"student": {"name": "pretrained", "path": EVIL}} if place == "student" else {}
    folder = write_run(tmp_path / (EVIL.replace("/", "") if place == "name" else "kl"), log, **recipe)
    data = json.loads((folder / "data.json").read_text())
    if place == "source":
        data["train"][0] = SOURCE | {"source": EVIL}
    if place == "example":
        data["train"][0] = SOURCE | {"unused": {EVIL: {"count": 1, "examples": [EVIL]}}}
    (folder / "data.json").write_text(json.dumps(data))
    found = inspection()
    if place == "text":
        found["texts"][0]["place"] = found["texts"][0]["tokens"][1]["text"] = EVIL
    (folder / "inspection.json").write_text(json.dumps(found))
    if place == "environment":
        (folder / "environment.json").write_text(json.dumps({"python": EVIL}))
    text = of(folder)
    assert "<img" not in text and "\u202e" not in text and "\x07" not in text
    assert "&lt;img" in text or "u003cimg" in text
    assert text.count("<script") == text.count("</script>") == 6


def test_attributes_and_text_are_escaped():
    assert element("p", '<b>"', title='"><i>') == '<p title="&quot;&gt;&lt;i&gt;">&lt;b&gt;&quot;</p>'
    assert element("input", checked=True, name=None, data_a_b=0) == '<input checked data-a-b="0">'
    assert visible("é\u200d\t\n\u200f") == "é\u200d\t\n⟨200F⟩"
    written = script_data("x", "</script>\u2028").removeprefix('<script type="application/json" id="x">')
    assert json.loads(written.removesuffix("</script>")) == "</script>\u2028"


def test_missing_parts_are_a_line_each_and_no_crash(tmp_path):
    folder = write_run(tmp_path / "bare", [])
    for name in ("metrics.jsonl", "results.json", "data.json", "environment.json"):
        (folder / name).unlink()
    found = sections(of(folder))
    assert "No run was inspected" in found["tokens"]
    assert "Nothing was logged yet" in found["curves"]
    assert "It needs two evaluations" in found["gap"]
    assert "It needs an inspection" in found["reliability"]
    assert "Neither throughput nor memory was logged" in found["resources"]
    assert "names no sources" in found["data"]
    assert "environment.json is missing" in found["reproduce"]
    assert "nothing was logged yet" in found["comparison"]
    assert "evaluation" not in found and "recipes" not in found


@pytest.mark.parametrize(
    "log",
    [
        [{"step": 5, "loss": 1.0, "images_per_second": 9.0}, {"step": 5, "eval_accuracy": 0.5, "eval_ece": 0.1}],
        [{"step": 5, "loss": float("nan")}, {"step": 5, "eval_loss": float("inf"), "eval_cross_entropy": float("nan")}],
        [{"step": 1, "eval_cross_entropy": 2.0, "eval_teacher_cross_entropy": 2.0}],
        [{"step": 1, "loss": 1e308, "eval_accuracy": -1e308}, {"step": 2, "loss": -1e308, "eval_accuracy": 1e308}],
        [{"step": 1, "loss": "odd", "eval_cross_entropy": None, "note": ["list"]}],
        [{"step": 7, "eval_fid": 12.0, "eval_loss": 0.5}, {"step": 9, "train_runtime": 3.0}],
    ],
)
def test_any_log_makes_a_page(tmp_path, log):
    text = of(
        write_run(tmp_path / "odd", log, teacher=None),
        write_run(tmp_path / "kl"),
        write_run(tmp_path / "ce", **BASELINE),
    )
    assert "NaN" not in text and "Infinity" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)


def test_the_figures_of_the_inspected_texts_are_told_with_their_errors(tmp_path):
    found = sections(of(write_inspected(tmp_path / "kl")))["tokens"]
    value = inspection()["measured"]["metrics"]["kl_to_teacher"]["value"]
    assert "KL to the teacher" in found and f"{value:.3f}<small> ± 0.100</small>" in found
    assert "2 documents, 78 tokens" in found


def test_rows_that_were_not_used_are_told_with_their_reason(tmp_path):
    found = sections(of(write_run(tmp_path / "kl")))["data"]
    assert "empty text" in found and "train.jsonl:3; train.jsonl:9" in found and "cut at max_length" in found


def test_the_results_of_a_job_are_the_last_section(tmp_path):
    text = of(write_run(tmp_path / "kl"), jobs={"job": JOB})
    found = sections(text)
    assert list(found)[-1] == "evaluation"
    assert "kdlm_arithmetic: exact_match ↑" in found["evaluation"] and "0.500*<small> ± 0.020" in found["evaluation"]
    assert (
        "batch 4: writing <small>tokens/s</small>" in found["evaluation"] and "812.5<small> ± 3" in found["evaluation"]
    )
    assert "KL to the teacher" in found["evaluation"] and "0.125<small> ± 0.010" in found["evaluation"]


def test_many_long_runs_stay_a_small_page(tmp_path):
    names = [f"measure_{number}" for number in range(15)]
    log = [{"step": step, **{name: step / 7 for name in names}, "loss": 1.0} for step in range(1, 3000)]
    folders = [write_run(tmp_path / f"run{number}", log, training={"max_steps": number}) for number in range(6)]
    for folder in folders:
        (folder / "inspection.json").write_text(json.dumps(inspection(texts=8, tokens=200)))
    assert len(of(*folders).encode()) < 4_000_000  # and about a million of Vega


class TestCommand:
    """`kdlm report`, with Vega stood in for where it is not what is tested."""

    @pytest.fixture(autouse=True)
    def _no_vega(self, monkeypatch):
        monkeypatch.setattr(writing, "bundle", lambda: "/* vega */")

    def test_it_writes_one_file_and_says_so(self, tmp_path, capsys):
        folder = write_inspected(tmp_path / "kl")
        output = tmp_path / "out" / "page.html"
        assert main(["report", str(folder), "-o", str(output), "--no-inspect"]) == 0
        assert capsys.readouterr().out.startswith(f"report: {output} (0.")
        assert list(output.parent.iterdir()) == [output]

    def test_a_folder_that_is_no_run_ends_with_2_and_writes_nothing(self, tmp_path, capsys):
        output = tmp_path / "page.html"
        good, bad = write_run(tmp_path / "kl"), tmp_path / "bad"
        assert main(["report", str(good), str(bad), "-o", str(output)]) == 2
        assert f"{bad}: no run" in capsys.readouterr().err and not output.exists()

    def test_results_of_an_evaluation_are_shown_with_a_run_and_refused_alone(self, tmp_path, capsys):
        folder, output = write_run(tmp_path / "kl"), tmp_path / "page.html"
        job = tmp_path / "job"
        job.mkdir()
        (job / "results.json").write_text(json.dumps(JOB))
        for place in (job, job / "results.json"):
            assert main(["report", str(folder), str(place), "-o", str(output), "--no-inspect"]) == 0
            assert "kdlm_arithmetic" in output.read_text()
        assert main(["report", str(job), "-o", str(output)]) == 2
        assert "give a run folder of kdlm train too" in capsys.readouterr().err

    def test_results_that_lie_in_the_run_are_found(self, tmp_path):
        folder, output = write_run(tmp_path / "kl"), tmp_path / "page.html"
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "results.json").write_text(json.dumps(JOB))
        assert main(["report", str(folder), "-o", str(output), "--no-inspect"]) == 0
        assert "kdlm_arithmetic" in output.read_text()

    def test_pngs_are_named_after_their_figures(self, tmp_path):
        pytest.importorskip("vl_convert")
        log = [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
        folder, pngs = write_run(tmp_path / "kl", log), tmp_path / "png"
        options = ["-o", str(tmp_path / "r.html"), "--png", str(pngs), "--no-inspect"]
        assert main(["report", str(folder), *options]) == 0
        assert {path.name for path in pngs.iterdir()} == {"curves-loss.png", "mixture-kl.png"}
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in pngs.iterdir())


def test_a_finished_run_is_inspected_and_what_hinders_it_is_a_note(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "kl")
    asked = []

    def inspect_run(path):
        asked.append(path)
        if len(asked) > 1:
            raise ValueError("trains no language model")
        return inspection()

    monkeypatch.setattr("kdlm.inspection.inspect_run", inspect_run)
    (run,) = read_runs([folder])
    assert writing.inspected(run) is run and asked == []  # it has no student yet
    (folder / "student").mkdir()
    assert writing.inspected(run).inspection == inspection()
    assert writing.inspected(run).notes == ["not inspected: trains no language model"]
    assert asked == [folder, folder]


def test_without_vega_it_is_said_what_to_install_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kdlm.report.drawing.installed", lambda: False)
    folder, output = write_run(tmp_path / "kl"), tmp_path / "page.html"
    assert main(["report", str(folder), "-o", str(output)]) == 2
    assert "pip install 'kdlm[report]'" in capsys.readouterr().err and not output.exists()


def test_a_tracker_gets_the_figures_of_a_run(tmp_path):
    pytest.importorskip("vl_convert")
    log = [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
    found = pictures(write_run(tmp_path / "kl", log))
    assert list(found) == ["curves/loss", "mixture/kl"]
    assert all(picture.startswith(b"\x89PNG") for picture in found.values())


def test_a_finished_run_is_not_lost_for_want_of_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kdlm.report.drawing.installed", lambda: False)
    assert pictures(write_run(tmp_path / "kl")) == {}
    assert capsys.readouterr().out.startswith("note: the tracker gets no figures: vl-convert-python is not installed")


def test_kdlm_train_hands_the_figures_down(tmp_path, monkeypatch):
    seen = []
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr("kdlm.train.train", lambda recipe, **options: seen.append(options) or tmp_path)
    assert main(["train", str(ROOT / "recipes" / "quickstart.yaml"), f"run_dir={tmp_path}"]) == 0
    assert seen == [{"resume": False, "figures": pictures, "placement": None}]
