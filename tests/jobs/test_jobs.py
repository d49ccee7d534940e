"""`kdlm eval`: figures are those of a plain loop, and nothing is evaluated twice."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from forks import start
from job_files import MODELS, TEACHER, TEXTS, job_in
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing

from kdlm.jobs import Job, lms
from kdlm.jobs.harness import Tasks, _plain
from kdlm.jobs.models import InProcess, Server
from kdlm.jobs.running import evaluate
from kdlm.jobs.verb import run
from kdlm.models import named
from kdlm.section_loader import load_section

ROOM = 100


def quiet(line: str) -> None:
    pass


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of what is opened and evaluated from now on."""
    done: list[str] = []
    load, ask = InProcess.load, Tasks.evaluate
    monkeypatch.setattr(InProcess, "load", lambda self, place: done.append(place) or load(self, place))
    monkeypatch.setattr(Tasks, "evaluate", lambda self, lm, name: done.append(name) or ask(self, lm, name))
    return done


def read(job: Job) -> dict[str, Any]:
    return json.loads((job.output / "results.json").read_text())


@torch.no_grad()
def nats(model: Any, tokenizer: Any, text: str, room: int) -> float:
    """Return the negative log-likelihood of a text, each token read once, in blocks of `room` tokens.

    The first token is predicted from the beginning of a sequence; before a later block stands what fits.
    """
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = [begin, *tokenizer(text, add_special_tokens=False).input_ids]
    total, done = 0.0, 1
    while done < len(ids):
        end = min(done + room, len(ids))
        seen = torch.tensor([ids[max(0, end - 1 - room) : end - 1]])
        logs = model(input_ids=seen).logits[0, done - end :].log_softmax(-1)
        total -= float(logs.gather(1, torch.tensor(ids[done:end])[:, None]).sum())
        done = end
    return total


def test_perplexity_is_that_of_a_plain_loop_over_texts_longer_than_the_context(tmp_path):
    models = {"teacher": {**MODELS["teacher"], "max_length": ROOM}}
    job = job_in(tmp_path, models=models, tasks=["tiny_perplexity"])
    run(job)
    found = {key: value["models"]["teacher"] for key, value in read(job)["tasks"]["tiny_perplexity"]["metrics"].items()}
    model, tokenizer = job.models["teacher"].load("models.teacher")
    lengths = [len(tokenizer(text).input_ids) for text in TEXTS]
    assert min(lengths) < ROOM and sum(length > 2 * ROOM for length in lengths) > 1
    total = sum(nats(model, tokenizer, text, ROOM) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    words = sum(len(text.split()) + 1 for text in TEXTS)  # what is behind the last line break counts as a word
    assert found["bits_per_byte"]["value"] == pytest.approx(total / size / math.log(2), rel=1e-5)
    assert found["byte_perplexity"]["value"] == pytest.approx(math.exp(total / size), rel=1e-4)
    assert found["word_perplexity"]["value"] == pytest.approx(math.exp(total / words), rel=1e-4)


def with_beginning(tokenizer: Any) -> tuple[str, int]:
    """Let a tokenizer add a beginning of sequence; return its text and its number."""
    begin = tokenizer.bos_token or tokenizer.eos_token
    number = tokenizer.convert_tokens_to_ids(begin)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{begin} $A", None, [(begin, number)])
    return begin, number


def test_a_beginning_that_the_tokenizer_adds_is_not_read_twice():
    source = named(TEACHER)
    model, tokenizer = source.load(), source.tokenizer()
    assert not lms.adds_beginning(tokenizer)
    _, number = with_beginning(tokenizer)
    assert lms.adds_beginning(tokenizer)
    lm = lms.hf(model, tokenizer, 2, None)
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS[:2]]
    plain = [-nats(model, tokenizer, text, 1024) for text in TEXTS[:2]]
    assert lm.loglikelihood_rolling(asked) == pytest.approx(plain, rel=1e-5)
    assert lm.tok_encode("def")[0] == number  # in front of a question it is added, as the model knows it


def test_a_server_is_sent_the_tokens_that_a_model_here_reads(tmp_path):
    """Texts as they are, behind a chat template that writes a beginning itself, and whole ones."""
    tokenizer = named(TEACHER).tokenizer()
    begin, number = with_beginning(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    section = Server(url="http://127.0.0.1:1", model="m", tokenizer=str(tmp_path))
    there = lms.server(section, named(str(tmp_path)), None, max_length=100, batch_size=2, seed=0)
    here = lms.hf(named(TEACHER).load(), tokenizer, 2, None)
    for text in ("def f", f"{begin}def f"):
        assert there.tok_encode(text) == here.tok_encode(text) == [number, *tokenizer.encode("def f")[1:]]
        assert there.tok_encode((text, text), add_special_tokens=True) == [here.tok_encode(text)] * 2
    read: list[Any] = []
    there._loglikelihood_tokens = lambda requests, **_: read.extend(requests) or [(0.0, True)] * len(requests)
    there.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("def f",), 0)])
    assert read == [(None, [number], tokenizer.encode("def f")[1:])]


def test_a_character_that_a_server_cut_does_not_stop_what_is_kept():
    assert _plain({"resps": ["caf\ud83d", np.float64(1)]}) == {"resps": ["caf?", 1.0]}


def test_a_second_run_opens_no_model_and_evaluates_nothing(tmp_path, counted):
    job = job_in(tmp_path)
    first = evaluate(job, quiet)
    assert len(counted) == 3 + 3 * 2
    counted.clear()
    assert evaluate(job, quiet) == first
    assert counted == []


def test_without_a_cache_all_is_evaluated_each_time(tmp_path, counted):
    job = job_in(tmp_path, "cache=null", models={"teacher": MODELS["teacher"]}, tasks=["tiny_choice"])
    evaluate(job, quiet)
    evaluate(job, quiet)
    assert counted == ["models.teacher", "tiny_choice"] * 2
    assert not (tmp_path / "cache").exists()


def test_only_what_changed_is_evaluated_again(tmp_path, counted):
    evaluate(job_in(tmp_path), quiet)
    counted.clear()
    evaluate(job_in(tmp_path, "tasks.tiny_choice={limit: 4}", "models.student.dtype=float16"), quiet)
    assert counted == [
        *("models.teacher", "tiny_choice"),
        *("models.student", "tiny_perplexity", "tiny_choice"),
        *("models.plain", "tiny_choice"),
    ]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("questions.jsonl", "glob", "heapq"),
        ("tiny_choice.yaml", "version: 1", "version: 2"),
        ("tiny_choice.yaml", "doc_to_text: question", "doc_to_text: '# {{question}}'"),
    ],
)
def test_a_task_whose_files_changed_is_another_one(tmp_path, counted, file, old, new):
    job = job_in(tmp_path, models={"teacher": MODELS["teacher"]})
    evaluate(job, quiet)
    counted.clear()
    path = tmp_path / "tasks" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    evaluate(load_section(Job, tmp_path / "job.yaml"), quiet)
    assert counted == ["models.teacher", "tiny_choice"]


def test_a_task_whose_data_are_a_folder_is_another_one_when_a_file_of_it_changes(tmp_path):
    job = job_in(tmp_path, models={"teacher": MODELS["teacher"]}, tasks=["tiny_choice"])
    (tmp_path / "data" / "test").mkdir(parents=True)
    rows = (tmp_path / "tasks" / "questions.jsonl").rename(tmp_path / "data" / "test" / "rows.jsonl")
    path = tmp_path / "tasks" / "tiny_choice.yaml"
    said = re.sub("dataset_path: .*\ndataset_kwargs: .*", f"dataset_path: {tmp_path / 'data'}", path.read_text())
    path.write_text(said)
    before = Tasks(job).identity("tiny_choice")
    assert Tasks(job).identity("tiny_choice") == before
    rows.write_text(rows.read_text().replace("glob", "heapq"))
    assert Tasks(job).identity("tiny_choice") != before


def test_a_model_whose_weights_changed_is_another_one_and_its_name_is_not_what_counts(tmp_path, counted):
    source = named(TEACHER)
    for name in ("a", "b"):
        source.load().save_pretrained(tmp_path / name)
        source.tokenizer().save_pretrained(tmp_path / name)
    models = {name: {"name": "hf", "path": str(tmp_path / name)} for name in ("a", "b")}
    job = job_in(tmp_path, models=models, tasks=["tiny_choice"])
    evaluate(job, quiet)
    assert counted == ["models.a", "tiny_choice"]
    counted.clear()
    changed = source.load()
    with torch.no_grad():
        next(changed.parameters()).mul_(1.5)
    changed.save_pretrained(tmp_path / "b")
    evaluate(job, quiet)
    assert counted == ["models.b", "tiny_choice"]


def test_a_result_that_is_damaged_is_noticed_and_made_again(tmp_path, counted):
    job = job_in(tmp_path, models={"teacher": MODELS["teacher"]})
    first = evaluate(job, quiet)
    counted.clear()
    kept = next((tmp_path / "cache").glob("*/tiny_choice-*.json"))
    for content in (kept.read_bytes()[:-20], kept.read_bytes().replace(b'"acc"', b'"abc"', 1), b"", b"\xff\n{}"):
        kept.write_bytes(content)
        said: list[str] = []
        assert evaluate(job, said.append) == first
        assert f"{kept} is damaged: made again" in said
        assert counted == ["models.teacher", "tiny_choice"]
        counted.clear()


def test_a_job_that_was_killed_goes_on_where_it_was(tmp_path, counted):
    tasks = ["tiny_perplexity", "tiny_choice", "tiny_answer"]
    job = job_in(tmp_path, models={"teacher": MODELS["teacher"]}, tasks=tasks)
    process = start("eval", str(tmp_path / "job.yaml"))
    cache = tmp_path / "cache"
    while not list(cache.glob("*/tiny_perplexity-*.json")):
        process.join(0.005)
        assert process.is_alive()
    process.kill()
    process.join()
    evaluate(job, quiet)
    assert counted[0] == "models.teacher" and "tiny_perplexity" not in counted and counted[-1] == "tiny_answer"


def test_groups_are_told_of_with_all_their_documents(tmp_path):
    job = job_in(tmp_path, tasks=["tiny"])
    group = {"group": "tiny", "task": ["tiny_choice", "tiny_answer"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks" / "group.yaml").write_text(json.dumps(group))
    run(job)
    tasks = read(job)["tasks"]
    assert tasks["tiny"]["metrics"]["acc"]["errors_from"] == "documents"
    assert tasks["tiny"]["asked"] and not tasks["tiny_choice"]["asked"]
    shown = (job.output / "results.md").read_text()
    assert "| tiny |" in shown and "tiny_choice" not in shown


def test_what_is_written_is_what_was_found(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no checkout
    job = job_in(tmp_path, tasks=["tiny_perplexity", "tiny_choice", "tiny_answer"])
    run(job)
    found, out = read(job), capfd.readouterr()
    assert found["models"]["teacher"]["role"] == "teacher" and found["models"]["teacher"]["parameters"] > 1000
    assert found["models"]["student"]["hash"] != found["models"]["plain"]["hash"]
    metric = found["tasks"]["tiny_perplexity"]["metrics"]["bits_per_byte"]
    student, plain = metric["models"]["student"], metric["models"]["plain"]
    less = metric["against_baseline"]["student"]
    assert less["difference"] == pytest.approx(student["value"] - plain["value"])
    assert {(pair["model"], pair["other"]) for pair in metric["pairs"]} == {
        ("student", "plain"),
        ("student", "teacher"),
    }
    assert set(metric["gap_closed"]) == {"student"}
    lines = (job.output / "samples/teacher/tiny_choice.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    figures = [(name, metric) for task in found["tasks"].values() for name, metric in task["metrics"].items()]
    assert {metric["errors_from"] for _, metric in figures} == {"documents"} and "brier_score" in dict(figures)
    assert [sample["doc_id"] for sample in samples] == list(range(11))
    table = (job.output / "results.md").read_text()
    assert table in out.out and "lm_eval" not in out.out
    assert not any(word in out.err for word in ("INFO", "Running", "fatal", "Loading"))
    (index,) = yaml.safe_load((job.output / "model-index/student.yaml").read_text())["model-index"]
    values = [metric["value"] for part in index["results"] for metric in part["metrics"]]
    metrics = [metric for task in found["tasks"].values() for metric in task["metrics"].values()]
    assert values == [metric["models"]["student"]["value"] for metric in metrics]
