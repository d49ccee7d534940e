"""Asking a server that is not always there: again where that helps, at once the reason where not, and an end."""

import pickle
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import accelerate.utils
import pytest
import torch
from fastapi import FastAPI, Response
from loopback import served, source
from scripted import Scripted, running
from torch.utils.data import DataLoader
from transformers import Trainer

from kdlm.data import Prefetched
from kdlm.losses import kept_rows
from kdlm.remote import Answers, Endpoint, Remote, ServerUnavailable
from kdlm.server_options import ServerOptions
from kdlm.teachers import LocalTeacher, ServedTeacher

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    app = FastAPI()

    @app.get("/thing")
    async def thing() -> Response:
        return Response(b"here")

    scripted = Scripted(app, "/thing")
    with running(scripted) as url:
        scripted.url = url
        yield scripted


def ask(script: Any, steps: list[Any], **options: Any) -> tuple[bytes, int, float]:
    """Follow a script; return the answer, the number of tries and the seconds."""
    script.script, script.asked = list(steps), 0
    remote = Remote(Endpoint(script.url, **{"patience": 10.0, "timeout": 5.0} | options))
    began = time.monotonic()
    try:
        return remote.request("GET", "/thing", limit=100), script.asked, time.monotonic() - began
    finally:
        remote.close()


@pytest.mark.parametrize("steps", [[429], [500], [503, 502], [0.4], [(503, {"Retry-After": "nonsense"})]])
def test_what_passes_is_tried_again(script: Any, steps: list[Any]) -> None:
    answer, tries, _ = ask(script, steps, timeout=0.2)
    assert (answer, tries) == (b"here", len(steps) + 1)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 307])
def test_what_does_not_pass_ends_at_once_with_the_servers_reason(script: Any, status: int) -> None:
    with pytest.raises(ServerUnavailable, match=f"/thing: refused, {status} .*as scripted"):
        ask(script, [status])
    assert script.asked == 1


@pytest.mark.parametrize("after", ["1", "Wed, 01 Jan 2098 00:00:00 GMT"])
def test_the_server_says_how_long_to_wait_and_is_believed_within_the_patience(script: Any, after: str) -> None:
    if after == "1":
        assert ask(script, [(429, {"Retry-After": after})])[2] >= 1.0
    else:
        with pytest.raises(ServerUnavailable, match=r"no answer within 0\.5 s \(429"):
            ask(script, [(429, {"Retry-After": after})], patience=0.5)


@pytest.mark.parametrize("steps", [[500] * 99, [5.0] * 9])
def test_the_patience_has_an_end(script: Any, steps: list[Any]) -> None:
    began = time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"no answer within 1 s"):
        ask(script, steps, patience=1.0, timeout=0.3)
    assert 0.9 < time.monotonic() - began < 2.5
    assert script.asked > 2


def test_a_server_that_is_not_there_is_a_clear_error_of_the_system(caplog: pytest.LogCaptureFixture) -> None:
    remote = Remote(Endpoint("http://127.0.0.1:9", patience=0.3))
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:9: no answer within 0\.3 s .*Connection refused"):
        remote.request("GET", "/thing", limit=100)
    assert len([r for r in caplog.records if "trying for another" in r.message]) == 1
    remote.close()


def test_an_answer_without_end_is_not_read_to_its_end(script: Any) -> None:
    with pytest.raises(ServerUnavailable, match="more than 100 bytes"):
        ask(script, [b"x" * 1_000_000])


def test_asking_leaves_the_random_numbers_of_the_run_alone(script: Any) -> None:
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    ask(script, [500, 500])
    assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())


def test_closing_ends_the_pauses_and_the_threads(script: Any) -> None:
    script.script = [500] * 99
    before = {thread.name for thread in threading.enumerate()}
    remote = Remote(Endpoint(script.url, patience=60.0))
    answers = remote.ask([lambda: remote.request("GET", "/thing", limit=100)] * 3)
    time.sleep(0.3)
    remote.close()
    with pytest.raises(ServerUnavailable, match="the run is over"):
        answers.result()
    end = time.monotonic() + 5
    while {thread.name for thread in threading.enumerate()} - before:
        assert time.monotonic() < end
        time.sleep(0.01)
    script.script = []


def test_the_key_is_read_from_the_environment_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    section = ServerOptions(url="http://127.0.0.1:9/", key_env="A_KEY")
    with pytest.raises(ValueError, match=r"teacher\.key_env: the environment variable A_KEY is not set"):
        section.remote()
    monkeypatch.setenv("A_KEY", "se\ncret")
    with pytest.raises(ValueError, match="characters that a header cannot carry"):
        section.remote()
    monkeypatch.setenv("A_KEY", " secret\n")
    assert section.remote().endpoint.key == "secret"
    assert "secret" not in section.model_dump_json() + repr(section) + repr(section.remote().endpoint)


# On its way with the batch


BATCH = {"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.arange(12).reshape(2, 6)}


def test_answers_pass_the_trainer_and_accelerate_untouched() -> None:
    answers = Answers([])
    batch = {**BATCH, "teacher": answers}
    moved = accelerate.utils.send_to_device(batch, torch.device("cpu"), non_blocking=True)
    assert Trainer._prepare_input(object.__new__(Trainer), answers) is answers
    assert moved["teacher"] is answers


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"number": index}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.arange(8)[None] * 7 % 500 + torch.tensor([row["number"] for row in rows])[:, None]
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_brings_its_answers_from_wherever_it_is_made(workers: int) -> None:
    model = source().load()
    local = LocalTeacher(model)
    with served(model) as server:
        teacher = ServedTeacher(Remote(Endpoint(server.url)))
        context = {"multiprocessing_context": "fork"} if workers else {}
        loader = DataLoader(
            Numbers(), batch_size=2, num_workers=workers, collate_fn=Prefetched(collate, teacher.prefetch), **context
        )
        for batch in loader:
            rows = kept_rows(batch["labels"])
            expected = local({key: batch[key] for key in ("input_ids", "labels")}, rows)
            torch.testing.assert_close(teacher(batch, rows).hidden, expected.hidden, atol=1e-5, rtol=1e-5)
        teacher.close()


def test_a_worker_process_hands_on_why_there_is_no_answer() -> None:
    with served(source().load()) as server:
        teacher = ServedTeacher(Remote(Endpoint(server.url, patience=0.2)))
    loader = DataLoader(
        Numbers(), batch_size=2, num_workers=1, collate_fn=Prefetched(collate, teacher.prefetch),
        multiprocessing_context="fork",
    )  # fmt: skip
    batch = next(iter(loader))
    with pytest.raises(ServerUnavailable, match="Connection refused"):
        teacher(batch, kept_rows(batch["labels"]))
    teacher.close()


def test_a_teacher_goes_to_another_process_without_its_head_and_its_lines() -> None:
    with served(source().load()) as server:
        teacher = ServedTeacher(Remote(Endpoint(server.url, "key")))
        copy = pickle.loads(pickle.dumps(teacher))
        assert copy._head is None and copy.remote.endpoint == teacher.remote.endpoint
        assert copy.remote is not teacher.remote and copy.remote._lines is None
        teacher.close()
