"""The tasks in the harness: scripted models whose figures are known, and a real one."""

import json
import math
import re
import socket
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import cycle
from pathlib import Path
from zlib import crc32

import pytest
import torch
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from kdlm.jobs.significance import documents
from kdlm.sandbox import build
from kdlm.sandbox.jsonl import read_jsonl
from kdlm.sandbox.tasks import gives

TASKS = Path(__file__).parents[2] / "eval" / "tasks"
GENERATED = ("kdlm_arithmetic", "kdlm_strings", "kdlm_entities")


class Answering(LM):
    """Says what a function of a request says; keeps the requests."""

    tokenizer_name = "scripted"

    def __init__(self, answer):
        super().__init__()
        self.answer, self.seen = answer, []

    def loglikelihood(self, requests):
        return [(value, False) for value in self.generate_until(requests)]

    def generate_until(self, requests):
        self.seen += requests
        return [self.answer(request) for request in requests]

    loglikelihood_rolling = generate_until

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history) + "<assistant>"


@pytest.fixture(autouse=True)
def offline_and_quick(monkeypatch):
    def refuse(*_):
        raise AssertionError("a task asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluator, "add_env_info", lambda storage: None)  # lists the machine's packages: seconds


@cache
def manager(**told) -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=told)


def evaluate(model, task, *, told=None, **settings):
    """Return the metrics of a task and its documents."""
    said = evaluator.simple_evaluate(
        model, tasks=[task], task_manager=manager(**told or {}), bootstrap_iters=0, **settings
    )
    figures = {name.partition(",")[0]: value for name, value in said["results"][task].items() if "," in name}
    return {name: value for name, value in figures.items() if not name.endswith("_stderr")}, said["samples"][task]


def test_every_file_is_data_with_a_version_and_a_name_of_its_own():
    known = manager()
    names = {path.stem for path in TASKS.glob("*.yaml")}
    assert {path.suffix for path in TASKS.rglob("*") if path.is_file()} == {".yaml"}
    assert names <= set(known.all_tasks)
    for name in names:
        assert "version" in known._index[name].cfg["metadata"]


@pytest.mark.parametrize("task", GENERATED)
def test_right_answers_get_all_and_wrong_ones_nothing(task):
    right, _ = evaluate(Answering(lambda request: request.doc["completion"]), task)
    wrong, _ = evaluate(Answering(lambda request: '["nobody"]'), task)
    best = {"f1": 1, "precision": 1, "recall": 1, "malformed": 0} if task == "kdlm_entities" else {"exact_match": 1}
    assert right == best
    assert wrong == dict.fromkeys(best, 0)


@pytest.mark.parametrize("task", GENERATED)
def test_a_model_is_shown_the_rows_prompt_and_nothing_of_eval_but_it(task):
    model = Answering(lambda request: "")
    evaluate(model, task, limit=20)
    assert all(request.args[0] == request.doc["prompt"] for request in model.seen)


@pytest.mark.parametrize("task", GENERATED)
def test_with_a_chat_template_the_prompt_is_a_users_message(task):
    model = Answering(lambda request: request.doc["completion"])
    figures, _ = evaluate(model, task, limit=20, apply_chat_template=True)
    assert all(request.args[0] == f"<user>{request.doc['prompt']}<assistant>" for request in model.seen)
    assert figures["f1" if task == "kdlm_entities" else "exact_match"] == 1


@pytest.mark.parametrize("task", GENERATED)
def test_worked_examples_come_from_the_train_file(task):
    model = Answering(lambda request: request.doc["completion"])
    figures, _ = evaluate(model, task, limit=20, num_fewshot=2)
    train = {row["prompt"]: row["completion"] for row in read_jsonl(build(task.removeprefix("kdlm_")) / "train.jsonl")}
    delimiter = " " if task == "kdlm_entities" else "\n"
    for request in model.seen:
        *examples, last = request.args[0].split("\n\n")
        assert last == request.doc["prompt"] and len(examples) == 2
        assert all(one in {f"{prompt}{delimiter}{train[prompt]}" for prompt in train} for one in examples)
        stops = [stop for stop in request.args[1]["until"] if stop != "\n"]
        assert not any(stop in request.doc["completion"] for stop in stops)
    assert figures["f1" if task == "kdlm_entities" else "exact_match"] == 1


@pytest.mark.parametrize("data", ["arithmetic", "strings", "entities"])
def test_no_problem_of_eval_is_in_train(data):
    train, asked = (
        [row["prompt"] for row in read_jsonl(build(data) / f"{split}.jsonl")] for split in ("train", "eval")
    )
    assert len(asked) == 500 and not set(asked) & set(train)


@pytest.mark.parametrize("task", ["kdlm_code_perplexity", "kdlm_code_next"])
def test_no_file_of_the_code_tasks_was_read_by_the_teacher_or_the_student(task):
    _, documents = evaluate(Answering(lambda request: -1.0), task)
    paths = {document["doc"]["path"] for document in documents}
    for split in ("teacher", "train"):
        assert not paths & {row["path"] for row in read_jsonl(build("code") / f"{split}.jsonl")}


def test_levels_are_the_parts_of_the_whole():
    model = Answering(lambda request: request.doc["completion"] if request.doc["level"] < 3 else "none\nat all")
    for family in ("arithmetic", "strings"):
        parts = [evaluate(model, f"kdlm_{family}_{level}", limit=50) for level in range(1, 6)]
        assert [figures["exact_match"] for figures, _ in parts] == [1, 1, 0, 0, 0]
        assert [{one["doc"]["level"] for one in documents} for _, documents in parts] == [{1}, {2}, {3}, {4}, {5}]


@pytest.mark.parametrize("task", ["kdlm_arithmetic_pass", "kdlm_strings_pass"])
def test_pass_at_k_of_samples_that_are_right_now_and_then(task):
    asked = Counter()

    def answer(request):
        """The n-th problem is right n mod 9 times of eight."""
        asked[request.doc_id] += 1
        return request.doc["completion"] if asked[request.doc_id] <= request.doc_id % 9 else "Answer: none"

    figures, documents = evaluate(Answering(answer), task, limit=18)
    assert set(asked.values()) == {8}
    for k in (1, 2, 4, 8):
        missed = [math.prod((8 - c - i) / (8 - i) for i in range(k)) for c in range(9)]
        assert figures[f"pass@{k}"] == pytest.approx(1 - sum(missed) / 9, abs=1e-12)
    settings = documents[0]["arguments"][0][1]
    assert settings["do_sample"] is True and settings["temperature"] > 0


def test_repeated_questions_after_an_answer_do_not_replace_it():
    """A base model goes on with questions of its own; the stop strings end it before them."""
    for task in ("kdlm_arithmetic", "kdlm_strings"):
        prompts = {row["prompt"] for row in read_jsonl(build(task.removeprefix("kdlm_")) / "eval.jsonl")}
        model = Answering(lambda request: "")
        evaluate(model, task, limit=1)
        stops = model.seen[0].args[1]["until"]
        for prompt in prompts:
            assert any(f"\n{prompt}".startswith(stop) for stop in stops), prompt


def test_code_perplexity_is_that_of_the_likelihoods():
    """A model of 3 bits a byte, whose tokens the harness does not see, and one whose tokens it may count."""
    model = Answering(lambda request: -3 * math.log(2) * len(request.args[0].encode()))
    figures, documents = evaluate(model, "kdlm_code_perplexity")
    texts = [row["text"] for row in read_jsonl(build("code") / "eval.jsonl")]
    assert [document["doc"]["text"] for document in documents] == texts
    size, words = (sum(map(count, texts)) for count in (lambda t: len(t.encode()), lambda t: len(re.split(r"\s+", t))))
    assert figures == {
        "bits_per_byte": pytest.approx(3),
        "byte_perplexity": pytest.approx(8),
        "word_perplexity": pytest.approx(8 ** (size / words)),
    }
    told, _ = evaluate(model, "kdlm_code_perplexity", told={"pretrained": str(build("code-student-tiny-bytes"))})
    assert told == {**figures, "perplexity": pytest.approx(8)}


def test_the_likeliest_line_is_the_answer():
    right, documents = evaluate(
        Answering(lambda request: -float(request.args[1] != "\n" + request.doc["choices"][request.doc["gold"]])),
        "kdlm_code_next",
    )
    assert right["acc"] == 1 and len(documents) == 400
    first = sum(document["doc"]["gold"] == 0 for document in documents) / 400
    assert 0.15 < first < 0.35
    blind, _ = evaluate(Answering(lambda request: -1.0), "kdlm_code_next")
    assert blind == {"acc": first, "brier_score": pytest.approx(0.75)}, "of equals the first is taken"


def test_lines_are_choices_with_a_chat_template_too():
    model = Answering(lambda request: -1.0)
    _, documents = evaluate(model, "kdlm_code_next", limit=5, apply_chat_template=True)
    for document in documents:
        assert [args[0] for args in document["arguments"]] == [f"<user>{document['doc']['context']}<assistant>"] * 4
        assert [args[1] for args in document["arguments"]] == document["doc"]["choices"]


def test_chance_on_four_lines_is_a_quarter():
    figures, _ = evaluate(Answering(lambda request: -float(crc32(request.args[1].encode()) % 997)), "kdlm_code_next")
    assert figures["acc"] == pytest.approx(0.25, abs=0.09)  # four standard errors


@pytest.mark.parametrize("task", [*GENERATED, "kdlm_code_next", "kdlm_code_perplexity", "kdlm_strings_pass"])
def test_documents_tell_every_metric_of_a_task_with_its_error(task):
    """So a job can say how sure a figure is, and test a difference between two models."""

    def answer(request):
        if task in ("kdlm_code_next", "kdlm_code_perplexity"):
            return -float(crc32(request.args[-1].encode()) % 997)
        return next(kinds)(request.doc["completion"])

    kinds = cycle([str, lambda completion: '["nobody"]', str, lambda completion: "not even", str])
    figures, samples = evaluate(Answering(answer), task, limit=25)
    metrics = {
        metric: {"metric": metric, "filter": samples[0]["filter"], "value": value} for metric, value in figures.items()
    }
    result = {"tasks": {task: {"metrics": metrics}}, "samples": {task: samples}, "groups": {}}
    result = json.loads(json.dumps(result, default=lambda array: array.tolist()))
    for metric, value in figures.items():
        found = documents({"student": result}, task, metric)["student"]
        assert found is not None, metric
        estimate = found.estimate()
        assert estimate.value == pytest.approx(value) and (estimate.error > 0 or value == 1), metric


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_real_models_perplexity_is_that_of_a_loop_by_hand():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build("code-teacher-tiny")
    arguments = {"pretrained": str(folder), "max_length": 128}
    figures, documents = evaluate(
        "hf", "kdlm_code_perplexity", told=arguments, model_args=arguments, limit=2, batch_size=4, device="cpu"
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    total = tokens = size = 0
    for document in documents:
        text = document["doc"]["text"]
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        for start in range(0, len(ids) - 1, 128):
            end = min(start + 128, len(ids) - 1)
            begin = max(end - 128, 0)  # the last window is as long as the others, and counts its new tokens alone
            with torch.no_grad():
                scores = model(torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
            predicted = torch.tensor(ids[begin + 1 : end + 1])
            total += scores.gather(1, predicted[:, None])[start - begin :].double().sum().item()
        tokens, size = tokens + len(ids) - 1, size + len(text.encode())
    assert figures["perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("chat", [False, True])
def test_a_real_model_writes_chooses_and_is_judged(chat):
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(build("code-teacher-tiny")), batch_size=4, device="cpu")
    for task in (*GENERATED, "kdlm_code_next", "kdlm_arithmetic_pass"):
        short = {} if task == "kdlm_code_next" else {"gen_kwargs": {"max_gen_toks": 8}}
        figures, documents = evaluate(model, task, limit=2, apply_chat_template=chat, **short)
        assert figures and all(0 <= value <= 2 for value in figures.values())
        for document in documents:
            if task in ("kdlm_arithmetic", "kdlm_strings"):
                assert document["exact_match"] == gives(document["resps"][0][0], document["doc"]["answer"])


@pytest.mark.slow
@pytest.mark.slow
def test_the_command_of_the_docs_runs(tmp_path):
    page = (TASKS.parents[1] / "docs" / "evaluation_tasks.md").read_text()
    (command,) = re.findall(r"^(python -m lm_eval run .*?)\n```", page, re.DOTALL | re.MULTILINE)
    words = command.replace("\\\n", " ").replace("$teacher", str(build("code-teacher-tiny"))).split()
    words = [sys.executable, *words[1:], "--limit", "2", "--output_path", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=TASKS.parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["kdlm_code_perplexity"]["perplexity,none"] > 1
