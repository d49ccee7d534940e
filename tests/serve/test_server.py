"""`kdlm serve` as a server: what it answers, what it refuses, and that nothing it is sent stops it."""

import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import psutil
import pytest
import torch
from loopback import Killable, served, source

from kdlm import serve as serving
from kdlm.cli import main
from kdlm.remote import Endpoint, Remote, ServerUnavailable
from kdlm.teachers import ServedTeacher
from kdlm.teachers.wire import MAX_BODY, Question, decode_answer, encode_question, read_head

KEY = "correct horse"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def model() -> Any:
    return source().load()


@pytest.fixture(scope="module")
def server(model: Any) -> Iterator[Any]:
    with served(model, key=KEY) as running:
        yield running


@pytest.fixture
def line(server: Any) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=server.url, headers=headers, trust_env=False, timeout=30) as client:
        yield client


def question(*lengths: int, asked: int = 0) -> Question:
    """Return a question about every position but the last of sequences of random ids."""
    tokens = sum(lengths)
    last = torch.tensor(lengths).cumsum(0) - 1
    rows = torch.tensor([t for t in range(tokens) if t not in last.tolist()])
    return Question(
        torch.randint(0, 512, (tokens,)),
        torch.tensor(lengths),
        rows,
        torch.randint(0, 512, (len(rows), asked)) if asked else None,
    )


@torch.no_grad()
def hidden_of(model: Any, asked: Question) -> torch.Tensor:
    """Compute the answer sequence by sequence, without padding."""
    states = [model.base_model(input_ids=ids[None]).last_hidden_state[0, rows] for ids, rows in asked.sequences()]
    return torch.cat(states)


def test_the_head_is_handed_out_once_and_named_by_its_digest(server: Any, line: httpx2.Client, model: Any, tmp_path):
    answer = line.get("/v1/head")
    (tmp_path / "head").write_bytes(answer.content)
    head = read_head(tmp_path / "head", torch.device("cpu"))
    assert torch.equal(head.weight, model.get_output_embeddings().weight) and head.bias is None
    assert (head.logit_scale, head.softcap) == (1.0, None)
    tag = answer.headers["etag"]
    assert tag == f'"{line.get("/v1/info").json()["head"]}"'
    again = line.get("/v1/head", headers={"if-none-match": tag})
    assert again.status_code == 304 and again.content == b""


def test_scores_are_log_probabilities_of_the_whole_vocabulary(server: Any, model: Any):
    asked = question(5, 31, 2, asked=3)
    teacher = ServedTeacher(Remote(Endpoint(server.url, KEY)))
    log_probs, total = teacher.scores(Question(asked.ids, asked.lengths, asked.rows), asked.asked)
    logits = model.get_output_embeddings()(hidden_of(model, asked)).detach()
    torch.testing.assert_close(total, logits.logsumexp(-1))
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(-1, asked.asked), atol=1e-5, rtol=1e-5)
    teacher.close()


def test_a_row_costs_its_hidden_state_and_little_more(line: httpx2.Client):
    asked = question(400)
    answer = line.post("/v1/hidden", content=encode_question(asked))
    assert len(answer.content) < len(asked.rows) * 64 * 4 + 512


def test_metrics_count_requests_tokens_and_the_queue(line: httpx2.Client):
    line.post("/v1/hidden", content=encode_question(question(9)))
    text = line.get("/metrics").text
    assert 'kdlm_requests_total{path="/v1/hidden",status="200"}' in text
    values = dict(row.rsplit(" ", 1) for row in text.splitlines() if not row.startswith("#"))
    assert int(values["kdlm_tokens_total"]) >= 9 and values["kdlm_queue_length"] == "0"
    assert values['kdlm_request_seconds_bucket{path="/v1/hidden",le="+Inf"}'] == values[
        'kdlm_request_seconds_count{path="/v1/hidden"}'
    ]  # fmt: skip


# What is refused


@pytest.mark.parametrize("sent", [None, "Bearer wrong", f"Basic {KEY}", "Bearer", f"Bearer {KEY}x", "Bearer \xff\xfe"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/hidden"), ("GET", "/v1/head"), ("GET", "/metrics")])
def test_without_the_key_nothing_is_said(server: Any, sent: str | None, method: str, path: str):
    headers = {} if sent is None else {"authorization": sent.encode("latin-1")}
    answer = httpx2.request(method, server.url + path, headers=headers, content=b"x", trust_env=False)
    assert answer.status_code == 401
    assert httpx2.get(f"{server.url}/health", trust_env=False).json() == {"status": "ok"}


def wrong(**changes: Any) -> bytes:
    import safetensors.torch

    right = {"ids": torch.arange(6), "lengths": torch.tensor([4, 2]), "rows": torch.tensor([0, 2, 4])}
    return safetensors.torch.save({name: part for name, part in (right | changes).items() if part is not None})


LONG = torch.zeros(2000, dtype=torch.int32)
REFUSED = {
    "nothing": (b"", 400, "no header"),
    "text": (b"hello, teacher", 400, "no header"),
    "a header that never ends": ((2**40).to_bytes(8, "little") + b"{}", 400, "no header"),
    "a tensor too few": (wrong(rows=None), 400, "expected the tensors ids, lengths, rows"),
    "a tensor too many": (wrong(asked=torch.zeros(3, 1).int()), 400, "expected the tensors"),
    "floats": (wrong(ids=torch.rand(6)), 400, "ids: expected int32 or int64"),
    "two dimensions": (wrong(rows=torch.zeros(1, 3).int()), 400, "rows: expected int32 or int64 of 1"),
    "lengths that do not fit": (wrong(lengths=torch.tensor([4, 3])), 422, "they sum to 7, and there are 6 ids"),
    "an empty sequence": (wrong(lengths=torch.tensor([6, 0])), 422, "lengths: 0 is not in 1..1024"),
    "a sequence too long": (wrong(ids=LONG, lengths=torch.tensor([2000])), 422, "this server takes 1024"),
    "an id too large": (wrong(ids=torch.arange(507, 513)), 422, "ids: 512 is not in 0..511"),
    "a negative id": (wrong(ids=-torch.arange(6)), 422, "ids: -5 is not in 0..511"),
    "a row past the end": (wrong(rows=torch.tensor([6])), 422, "rows: 6 is not in 0..5"),
    "a row twice": (wrong(rows=torch.tensor([1, 1])), 422, "strictly ascending"),
    "no row": (wrong(rows=torch.zeros(0).int()), 422, "one row"),
}


@pytest.mark.parametrize(("body", "status", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_question_is_refused_in_words(line: httpx2.Client, body: bytes, status: int, words: str):
    answer = line.post("/v1/hidden", content=body)
    assert answer.status_code == status and words in answer.json()["detail"]


def test_ids_without_a_score_cannot_be_asked_for(line: httpx2.Client):
    for asked, words in (
        (torch.tensor([[0], [1], [512]]), "asked: 512"),
        (torch.zeros(2, 1).int(), "expected [3, at least 1]"),
    ):
        answer = line.post("/v1/scores", content=wrong(asked=asked))
        assert answer.status_code == 422 and words in answer.json()["detail"]


def test_a_body_that_is_too_large_is_not_read(server: Any, line: httpx2.Client):
    def pour() -> Iterator[bytes]:
        for _ in range(MAX_BODY // 65536 + 1):
            yield b"\0" * 65536

    for path, body in (("hidden", b"\0" * 40_000), ("hidden", pour()), ("scores", b"\0" * (MAX_BODY + 1))):
        try:
            assert line.post(f"/v1/{path}", content=body).status_code == 413
        except httpx2.TransportError:  # it hangs up while the rest is on its way
            assert len(body) > 40_000 if isinstance(body, bytes) else True
    assert line.post("/v1/hidden", content=encode_question(question(3))).is_success


def test_fuzzed_bodies_are_refused_and_the_server_goes_on(line: httpx2.Client):
    chance = random.Random(0)
    sound = encode_question(question(7, 3, 12))
    statuses = set()
    for attempt in range(600):
        body = bytearray(sound)
        match attempt % 4:
            case 0:
                body = body[: chance.randrange(len(body))]
            case 1:
                body = bytearray(chance.randbytes(chance.randrange(300)))
            case 2:  # in the header, where offsets, types and shapes are
                for _ in range(chance.randint(1, 4)):
                    body[chance.randrange(200)] = chance.randrange(256)
            case _:
                for _ in range(chance.randint(1, 4)):
                    body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        path = "/v1/scores" if attempt % 16 == 15 else "/v1/hidden"
        statuses.add(line.post(path, content=bytes(body)).status_code)
    assert {400, 422} <= statuses <= {200, 400, 422}
    assert line.post("/v1/hidden", content=sound).is_success


def test_other_paths_and_methods_are_refused_and_counted_as_one(server: Any, line: httpx2.Client):
    assert [line.get(f"/{n}").status_code for n in range(3)] == [404] * 3
    assert line.get("/v1/hidden").status_code == 405 and line.get("/docs").status_code == 404
    assert line.get("/metrics").text.count('path="other",status="404"') == 1


def test_a_model_that_fails_on_one_request_answers_the_others(server: Any, line: httpx2.Client, monkeypatch, caplog):
    read = server.scorer._read

    def fails(sequences: Any) -> Any:
        if any(int(ids[0]) == 13 for ids, _ in sequences):
            raise RuntimeError("out of memory\nand a long story")
        return read(sequences)

    monkeypatch.setattr(server.scorer, "_read", fails)
    good, poison = question(5), question(5)
    good.ids[0], poison.ids[0] = 12, 13
    with ThreadPoolExecutor(8) as pool:
        bodies = [encode_question(poison if n % 4 == 0 else good) for n in range(16)]
        answers = list(pool.map(lambda body: line.post("/v1/hidden", content=body), bodies))
    assert [answer.status_code for answer in answers] == [500 if n % 4 == 0 else 200 for n in range(16)]
    assert answers[0].json() == {"detail": "the model failed: out of memory"}


def test_a_full_queue_tells_to_come_again_and_clients_do(model: Any):
    with served(model, max_queue=2) as server:
        gate, answer = threading.Event(), server.batcher._answer
        server.batcher._answer = lambda questions: gate.wait(30) and answer(questions)
        asked = question(300)
        teacher = ServedTeacher(Remote(Endpoint(server.url, concurrency=8, patience=30)))
        with ThreadPoolExecutor(8) as pool:
            pending = [pool.submit(teacher.hidden, asked) for _ in range(8)]
            while server.metrics.text(0).count('path="/v1/hidden",status="429"') == 0:
                assert not any(one.done() for one in pending)
                time.sleep(0.01)
            refused = httpx2.post(f"{server.url}/v1/hidden", content=encode_question(asked), trust_env=False)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            gate.set()
            for one in pending:
                torch.testing.assert_close(one.result(), hidden_of(model, asked), atol=1e-5, rtol=1e-5)
        teacher.close()


def test_a_question_whose_client_has_hung_up_is_not_computed(model: Any):
    with served(model) as server:
        entered, gate, answer, computed = threading.Event(), threading.Event(), server.batcher._answer, []

        def held(questions: Any) -> Any:
            entered.set()
            gate.wait(30)
            computed.extend(question.tokens for question in questions)
            return answer(questions)

        server.batcher._answer = held
        with ThreadPoolExecutor(1) as pool, httpx2.Client(base_url=server.url, trust_env=False) as client:
            first = pool.submit(client.post, "/v1/hidden", content=encode_question(question(5)), timeout=30)
            assert entered.wait(30)
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(
                    f"{server.url}/v1/hidden", content=encode_question(question(6)), timeout=0.3, trust_env=False
                )
            while server.metrics.text(0).count('status="499"') == 0:
                time.sleep(0.01)
            gate.set()
            assert first.result().is_success
            assert client.post("/v1/hidden", content=encode_question(question(7))).is_success
        assert computed == [5, 7]


# The whole of it


def test_eight_clients_are_all_answered_rightly_and_memory_stays_flat(model: Any):
    process = Killable().start().wait()
    try:
        pool_of_questions = [question(*[random.randint(2, 40) for _ in range(random.randint(1, 4))]) for _ in range(20)]
        expected = [hidden_of(model, asked) for asked in pool_of_questions]
        bodies = [encode_question(asked) for asked in pool_of_questions]
        memory = psutil.Process(process.process.pid).memory_info

        def ask(client: int, times: int) -> None:
            with httpx2.Client(base_url=process.url, trust_env=False, timeout=60) as line:
                for n in range(times):
                    which = (7 * client + n) % len(bodies)
                    parts, _ = decode_answer(line.post("/v1/hidden", content=bodies[which]).content)
                    torch.testing.assert_close(parts["hidden"], expected[which], atol=1e-5, rtol=1e-5)

        with ThreadPoolExecutor(8) as clients:
            list(clients.map(ask, range(8), [50] * 8))
            early = memory().rss
            list(clients.map(ask, range(8), [150] * 8))
            late = memory().rss
        assert late - early < 8 << 20, f"{(late - early) / 2**20:.1f} MiB more after 1,200 further requests"
        numbers = httpx2.get(f"{process.url}/metrics", trust_env=False).text
        assert 'kdlm_requests_total{path="/v1/hidden",status="200"} 1600' in numbers
        batches = int(next(row for row in numbers.splitlines() if row.startswith("kdlm_batches_total")).split()[1])
        assert batches < 1600, "requests that arrive together are read together"
    finally:
        process.kill()


def test_other_machines_are_let_in_with_a_key_only(monkeypatch, capsys):
    monkeypatch.delenv("SERVE_KEY", raising=False)
    words = ["serve", "--model", "sandbox:code-teacher-tiny", "--host", "0.0.0.0"]
    assert main(words) == 2
    assert "--host 0.0.0.0: others could reach this server: give it a key" in capsys.readouterr().err
    assert main([*words, "--key-env", "SERVE_KEY"]) == 2
    assert "--key-env: the environment variable SERVE_KEY is not set" in capsys.readouterr().err


def test_a_port_that_is_taken_and_a_model_that_is_not_there_are_said_in_words(server: Any, capsys, monkeypatch):
    port = server.url.rsplit(":", 1)[1]
    assert main(["serve", "--model", "sandbox:code-teacher-tiny", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert main(["serve", "--model", "sandbox:code-teecher", "--port", "0"]) == 2
    assert "the sandbox has no model 'code-teecher', did you mean code-teacher?" in capsys.readouterr().err
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert main(["serve", "--model", "sandbox:code-teacher-tiny"]) == 2
    assert "pip install 'kdlm[serve]'" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_said_in_words(capsys):
    assert main(["serve", "--model", "sandbox:code-teacher-tiny", "--port", "0", "--device", "abacus"]) == 2
    assert "--device abacus: " in capsys.readouterr().err


def test_a_server_that_is_told_to_stop_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process = Killable().start().wait()
    assert [folder.name.startswith("kdlm-serve-") for folder in tmp_path.iterdir()] == [True]
    process.process.terminate()
    process.process.join(20)
    assert process.process.exitcode == 0 and list(tmp_path.iterdir()) == []


def test_a_key_reaches_the_server_and_a_wrong_one_ends_at_once(server: Any):
    right, other = Remote(Endpoint(server.url, KEY)), Remote(Endpoint(server.url, "nonsense"))
    assert json.loads(right.request("GET", "/v1/info", limit=9999))["model"] == "tiny"
    with pytest.raises(ServerUnavailable, match="refused, 401 Unauthorized: wrong key, or none"):
        ServedTeacher(other)
    right.close()
    other.close()
    assert "nonsense" not in repr(Endpoint(server.url, "nonsense"))
