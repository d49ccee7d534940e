"""A run whose teacher is a server: the same run as with a local teacher, whatever happens to the server."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fastapi import Request, Response
from loopback import Killable, Threaded, served, source
from safetensors.torch import load_file

from kdlm import checkpoints
from kdlm.check import check
from kdlm.cli import main
from kdlm.recipe import load
from kdlm.teachers import ServedTeacher
from kdlm.train import train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: served, url: "URL", of: {name: sandbox, model: code-teacher-tiny}, patience: 60}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 32, eval_rows: 1}
method: {name: taid, start: 0.2, alpha: 0.05}
losses: [{name: cross_entropy, weight: 0.1}]
training: {max_steps: 8, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, learning_rate: 0.01,
           logging_steps: 1, save_steps: 100, eval_strategy: steps, eval_steps: 6, use_cpu: true}
run_dir: {RUN}
"""
LOCAL = "teacher={name: sandbox, model: code-teacher-tiny}"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def make(url: str, name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.replace("URL", url).replace("{RUN}", str(tmp_path / name)))
        return path

    return make


@pytest.fixture
def local(write: Any, tmp_path: Path) -> dict[str, torch.Tensor]:
    train(load(write("http://127.0.0.1:9", "local"), [LOCAL]))
    return weights(tmp_path / "local")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-4, atol=1e-5)


def steps(run: Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with served(source().load(), model="sandbox:code-teacher-tiny") as running:
        yield running


@pytest.mark.parametrize(
    "options",
    [[], ["training.dataloader_num_workers=2"], ["data.packing=pack", "training.per_device_train_batch_size=2"]],
    ids=["main process", "worker processes", "packed"],
)
def test_training_with_a_served_teacher_is_training_with_a_local_one(
    write: Any, tmp_path: Path, server: Any, options: list[str]
) -> None:
    train(load(write("http://127.0.0.1:9", "plain"), [LOCAL, *options]))
    train(load(write(server.url, "served"), options))
    same(weights(tmp_path / "plain"), weights(tmp_path / "served"))
    figures = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("plain", "served")]
    assert figures[1]["eval_kl_to_teacher"] == pytest.approx(figures[0]["eval_kl_to_teacher"], rel=1e-4)
    assert "sandbox:code-teacher-tiny at http" in (tmp_path / "served" / "student" / "README.md").read_text()


def test_requests_are_under_way_while_the_student_computes(
    write: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a step asks for its teacher, the question of the next batch has been sent already."""
    ahead: list[int] = []
    asked, sent = 0, 0
    prefetch, call = ServedTeacher.prefetch, ServedTeacher.__call__

    def noting_prefetch(self: Any, batch: Any) -> Any:
        nonlocal sent
        sent += 1
        return prefetch(self, batch)

    def noting_call(self: Any, batch: Any, rows: Any) -> Any:
        nonlocal asked
        asked += 1
        ahead.append(sent - asked)
        return call(self, batch, rows)

    monkeypatch.setattr(ServedTeacher, "prefetch", noting_prefetch)
    monkeypatch.setattr(ServedTeacher, "__call__", noting_call)
    train(load(write(server.url, "ahead"), ["training.eval_strategy=no", "data.eval_rows=null"]))
    assert len(ahead) == 16 and min(ahead[:-2]) >= 1


def test_a_server_that_is_killed_and_started_again_costs_no_step(
    write: Any, tmp_path: Path, local: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    server = Killable().start().wait()
    path = write(server.url, "killed")
    run = tmp_path / "killed"

    def strike() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and (not (run / "metrics.jsonl").exists() or len(steps(run)) < 3):
            time.sleep(0.002)
        server.kill()
        time.sleep(0.5)
        server.start()

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        assert main(["train", str(path)]) == 0
    finally:
        thread.join()
        server.kill()
    same(local, weights(run))
    assert steps(run) == list(range(1, 9))
    assert "answers again" in caplog.text


def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint_that_goes_on(
    write: Any, tmp_path: Path, local: dict[str, torch.Tensor], server: Any, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    front = Threaded(Gate(server.url))
    path, run = write(front.url, "away"), tmp_path / "away"
    Gate.left = 9  # questions: 2 micro-batches a step, so it goes in the middle of one
    assert main(["train", str(path), "teacher.patience=0.5"]) == 2
    said = capsys.readouterr().err
    assert f"{path}:3: teacher.url: {front.url}: no answer within 0.5 s (503 " in said
    (checkpoint,) = checkpoints.finished(run)
    step = checkpoints.step_of(checkpoint)
    assert 1 <= step <= 5
    assert f"stopped after step {step}, saved as {checkpoint}; when the server is back, --resume goes on" in said
    assert "Traceback" not in said
    checkpoints.verify(checkpoint)
    Gate.left = 10_000
    assert main(["train", str(path), "teacher.patience=0.5", "--resume"]) == 0
    front.stop()
    same(local, weights(run))
    assert steps(run) == list(range(1, 9))


def test_a_server_that_was_never_there_is_said_before_anything_is_written(write: Any, tmp_path: Path, capsys) -> None:
    path = write("http://127.0.0.1:9", "never")
    assert main(["train", str(path), "teacher.patience=0.2"]) == 2
    assert f"{path}:3: teacher.url: http://127.0.0.1:9: no answer within 0.2 s" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_a_server_of_another_family_is_refused(write: Any, capsys) -> None:
    with served(source().load(), tokenizer="of something else") as other:
        assert main(["train", str(write(other.url, "other"))]) == 2
    assert "teacher.of: sandbox:code-teacher-tiny has another tokenizer than the served" in capsys.readouterr().err


def test_the_check_tells_what_is_served_and_takes_no_offence_at_an_empty_address(write: Any, server: Any) -> None:
    path = write(server.url, "checked")
    assert f"teacher: {server.url} serves sandbox:code-teacher-tiny in float32" in check(load(path))
    lines = check(load(path, ["teacher.url=http://127.0.0.1:9"]))
    assert any(line.startswith("teacher: not looked at here (http://127.0.0.1:9: no answer") for line in lines)
    assert any("ids shared, identical" in line for line in lines)
    openai = (
        "teacher={name: openai, url: 'http://127.0.0.1:9', model: m, of: {name: sandbox, model: code-teacher-tiny}}"
    )
    lines = check(load(path, [openai, "method={name: logit_kd}", "losses=[{name: forward_kl}]"]))
    assert any(line.startswith("teacher: not looked at here") for line in lines)


class Gate:
    """Hands requests on to a server, until it has let `left` questions pass; then it is busy for good."""

    left = 0

    def __init__(self, url: str):
        self.url = url

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        if scope["path"] == "/v1/hidden":
            Gate.left -= 1
            if Gate.left < 0:
                await Response(status_code=503)(scope, receive, send)
                return
        async with httpx2.AsyncClient(base_url=self.url, trust_env=False) as client:
            answer = await client.request(scope["method"], scope["path"], content=await request.body())
        await Response(answer.content, answer.status_code)(scope, receive, send)
