"""A served model gives what it gives in process; what is wrong with a server is said with its key."""

import pytest
from completions_server import served
from job_files import MODELS, TEACHER, job_in

from kdlm import cli
from kdlm.jobs.lms import tries
from kdlm.jobs.models import Server
from kdlm.jobs.running import evaluate
from kdlm.models import named

TASKS = ["tiny_perplexity", "tiny_choice", "tiny_answer"]


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def tiny():
    source = named(TEACHER)
    return source.load().eval(), source.tokenizer()


def server(url: str, **more):
    return {"name": "server", "url": url, "model": "tiny", "tokenizer": TEACHER, "patience": 0.1, **more}


@pytest.mark.parametrize("concurrency", [1, 4])
def test_local_completions_of_a_served_model_gives_what_it_gives_in_process(tmp_path, tiny, concurrency):
    with served(*tiny) as running:
        models = {"here": {"name": "hf", "path": TEACHER}, "there": server(running.url, concurrency=concurrency)}
        given = evaluate(job_in(tmp_path, models=models, tasks=TASKS), quiet)
        for task in TASKS:
            here, there = (given[name].results[task] for name in ("here", "there"))
            for metric, figure in here["tasks"][task]["metrics"].items():
                assert figure["value"] == pytest.approx(there["tasks"][task]["metrics"][metric]["value"], rel=1e-5)
            texts = [[s["filtered_resps"] for s in result["samples"][task]] for result in (here, there)]
            assert task != "tiny_answer" or (texts[0] == texts[1] and any(text[0] for text in texts[0]))


def test_a_chat_endpoint_writes_what_the_model_writes_behind_its_chat_template(tmp_path, tiny):
    with served(*tiny) as running:
        there = server(running.url, chat=True, tokenizer=None)
        models = {"here": {"name": "hf", "path": TEACHER}, "there": there}
        given = evaluate(job_in(tmp_path, "apply_chat_template=true", models=models, tasks=["tiny_answer"]), quiet)
        texts = {
            name: [sample["filtered_resps"] for sample in one.results["tiny_answer"]["samples"]["tiny_answer"]]
            for name, one in given.items()
        }
        assert texts["here"] == texts["there"] and any(text[0] for text in texts["here"])
        assert ("/v1/chat/completions", None) in running.asked


def test_the_key_of_the_environment_and_no_other_is_sent(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "a vendor's")
    with served(*tiny) as running:
        evaluate(job_in(tmp_path, models={"m": server(running.url)}, tasks=["tiny_choice"]), quiet)
        assert {key for _, key in running.asked} == {None}
    with served(*tiny, key="ours") as running:
        models = {"m": server(running.url, key_env="OUR_KEY")}
        job = job_in(tmp_path, models=models, tasks=["tiny_choice"])
        assert cli.main(["eval", str(tmp_path / "job.yaml")]) == 2
        line = next(k for k, row in enumerate((tmp_path / "job.yaml").read_text().splitlines(), 1) if "key_env" in row)
        said = f"job.yaml:{line}: models.m.key_env: the environment variable OUR_KEY is not set, or empty"
        assert said in capsys.readouterr().err
        monkeypatch.setenv("OUR_KEY", "ours")
        evaluate(job, quiet)
        assert {key for _, key in running.asked} == {"Bearer ours"}


def failed(folder, capsys, *overrides: str) -> str:
    assert cli.main(["eval", str(folder / "job.yaml"), *overrides]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_a_server_that_is_away_or_has_no_such_model_is_said_with_the_line(tmp_path, tiny, capsys):
    with served(*tiny) as running:
        models = {"m": server(running.url, model="tinny")}
        job_in(tmp_path, models=models, tasks=["tiny_choice"])
        assert "models.m.model: " in (said := failed(tmp_path, capsys))
        assert "serves no 'tinny', did you mean tiny? It serves tiny" in said and said.startswith(str(tmp_path))
    said = failed(tmp_path, capsys, "models.m.model=tiny")
    assert "models.m.url: " in said and "no answer within 0.1 s" in said


def test_a_server_that_goes_away_while_it_answers_is_said_with_the_task(tmp_path, tiny, capsys, monkeypatch):
    with served(*tiny) as running:
        job_in(tmp_path, models={"m": server(running.url)}, tasks=["tiny_choice"])
        opened = Server.open

        def open_and_stop(self, *args):
            lm = opened(self, *args)
            running.stop()
            return lm

        monkeypatch.setattr(Server, "open", open_and_stop)
        said = failed(tmp_path, capsys)
    assert "models.m.url: " in said and "while it answered tiny_choice" in said


def test_a_chat_endpoint_cannot_be_asked_for_log_probabilities(tmp_path, tiny, capsys):
    with served(*tiny) as running:
        models = {"m": server(running.url, chat=True, tokenizer=None)}
        job_in(tmp_path, "apply_chat_template=true", models=models, tasks=["tiny_choice"])
        said = failed(tmp_path, capsys, "apply_chat_template=true")
        assert "tasks.tiny_choice: models.m cannot answer it" in said
        assert "models.m.chat: " in failed(tmp_path, capsys)
        assert "models.m.tokenizer: missing" in failed(tmp_path, capsys, "models.m.chat=false")


def test_tries_fill_the_patience():
    assert [tries(seconds) for seconds in (0.1, 1, 2, 4, 30)] == [2, 2, 3, 4, 8]


def test_models_of_this_process_and_servers_have_one_role_each(tmp_path):
    assert job_in(tmp_path, models={**MODELS, "m": server("http://127.0.0.1:1", role="other")}).of("other") == ["m"]
