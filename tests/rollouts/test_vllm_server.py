"""The engine `vllm_server` against a server that behaves as vLLM does, and fails as a test wants.

The weights of this server are one number, the sum of what it was sent. What it writes depends on the weights, the
prompt and the seed alone, so a completion tells which weights it comes from.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from loopback import Threaded
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from kdlm.remote import Endpoint, Remote, ServerUnavailable
from kdlm.rollouts import Completion, Sampling
from kdlm.rollouts.vllm_server import VLLMServerEngine, VLLMServerSection
from kdlm.rollouts.weight_transfer import FileTransfer, one_process

END, CONTEXT = 1, 24
PROMPTS = [[3, 4, 5], [6, 7], [8] * 20, [9]]


def failed(words: str) -> JSONResponse:
    message = f"Call to collective_rpc method failed: Worker failed with error '{words}'"
    return JSONResponse({"error": {"message": message, "code": 500}}, 500)


class FakeVLLM:
    """vLLM's part of the protocol. `script` maps a path to functions that answer its next requests instead."""

    def __init__(self) -> None:
        self.script: dict[str, list[Any]] = {}
        self.headers: list[Any] = []
        self.version = "0.30.0"
        self.processed = self.developer = self.transfer = True
        self.prompts: list[list[int]] = []
        self.sent = 0
        self.restart()

    def restart(self) -> None:
        self.name, self.weights, self.active, self.met = "default", 0.0, False, False

    async def answer(self, request: Request, path: str) -> Any:
        self.headers.append(request.headers)
        body = await request.body()
        data = await request.json() if body else None
        if steps := self.script.get(path):
            answer = steps.pop(0)(data)
            if answer is not None:
                return answer
        if path in ("v1/completions", "v1/models", "version") or self.developer:
            return getattr(self, path.replace("/", "_"))(data)
        return JSONResponse({"detail": "Not Found"}, 404)

    def weight_info(self, data: Any) -> Any:
        return {"weight_version": self.name}

    def v1_models(self, data: Any) -> Any:
        return {"data": [{"id": "student", "max_model_len": CONTEXT}]}

    def init_weight_transfer_engine(self, data: Any) -> Any:
        self.met = True
        return {} if self.transfer else failed("Weight transfer not configured.")

    def start_weight_update(self, data: Any) -> Any:
        if self.active:
            return failed("start_weight_update called while a weight update is already active.")
        self.active, self.weights = True, 0.0
        return {}

    def update_weights(self, data: Any) -> Any:
        assert self.active and self.met
        self.weights += sum(float(tensor.sum()) for tensor in load_file(data["update_info"]["path"]).values())
        return {}

    def finish_weight_update(self, data: Any) -> Any:
        self.active = False
        self.sent += 1
        return {}

    def reset_prefix_cache(self, data: Any) -> Any:
        return {"success": True}

    def update_weight_version(self, data: Any) -> Any:
        self.name = data["new_version"]
        return {}

    def v1_completions(self, data: Any) -> Any:
        if "allowed_token_ids" in data:
            return self._choices([([0], [0.0 if self.processed else -3.0])])
        assert data["model"] == "student" and data["ignore_eos"] and data["stop_token_ids"] == [END]
        assert len(data["prompt"]) + data["max_tokens"] <= CONTEXT
        assert data["n"] == 1 or data["temperature"] > 0
        self.prompts.append(data["prompt"])
        return self._choices([written(self.weights, data, sample) for sample in range(data["n"])])

    def _choices(self, samples: list[tuple[list[int], list[float]]]) -> Any:
        choices = [
            {"index": place, "token_ids": ids, "logprobs": {"token_logprobs": log_probs}}
            for place, (ids, log_probs) in enumerate(samples)
        ]
        return {"choices": choices[::-1]}


def written(weights: float, data: Any, sample: int) -> tuple[list[int], list[float]]:
    drawn = random.Random(f"{weights:.3f} {data['prompt']} {data['seed'] + sample}")
    ids: list[int] = []
    while len(ids) < data["max_tokens"] and ids[-1:] != [END]:
        ids.append(drawn.randrange(1, 9))
    return ids, [-drawn.random() for _ in ids]


@pytest.fixture
def vllm() -> Iterator[Any]:
    app, fake = FastAPI(), FakeVLLM()
    app.add_api_route("/version", lambda: {"version": fake.version})

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def anything(request: Request, path: str) -> Any:
        return await fake.answer(request, path)

    server = Threaded(app)
    fake.url = server.url
    try:
        yield fake
    finally:
        server.stop()


@pytest.fixture
def student() -> Any:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def engine(vllm: Any, tmp_path: Path) -> Iterator[VLLMServerEngine]:
    remote = Remote(Endpoint(vllm.url, timeout=5.0, patience=2.0))
    engine = VLLMServerEngine(remote, FileTransfer(tmp_path), frozenset({END}))
    yield engine
    engine.close()
    assert list(tmp_path.iterdir()) == []


def total(student: Any) -> float:
    return sum(float(weight.detach().sum()) for weight in student.parameters())


def step(student: Any) -> None:
    with torch.no_grad():
        student.lm_head.weight.add_(torch.rand_like(student.lm_head.weight))


SAMPLING = Sampling(max_new_tokens=6, samples_per_prompt=3)


def expected(student: Any, vllm: Any, tmp_path: Path, version: int, sampling: Sampling = SAMPLING) -> list[Completion]:
    """Return what is written with the student's weights, by an engine whose server nobody disturbs."""
    script, vllm.script = vllm.script, {}
    other = VLLMServerEngine(Remote(Endpoint(vllm.url)), FileTransfer(tmp_path), frozenset({END}))
    other.take(student, version)
    completions = other.generate(PROMPTS, sampling, 7)
    other.close()
    vllm.restart()
    vllm.script, vllm.sent, vllm.prompts = script, 0, []
    return completions


def test_the_server_gets_the_students_weights_once_a_take(vllm: Any, engine: Any, student: Any) -> None:
    for version in range(3):
        engine.take(student, version)
        assert vllm.weights == pytest.approx(total(student), abs=1e-4)
        completions = engine.generate(PROMPTS, SAMPLING, version)
        assert {one.version for one in completions} == {version}
        step(student)
    assert vllm.sent == 3


def test_completions_are_bounded_grouped_and_ended(vllm: Any, engine: Any, student: Any) -> None:
    engine.take(student, 0)
    completions = engine.generate(PROMPTS, Sampling(max_new_tokens=9, samples_per_prompt=3), 0)
    assert [one.group for one in completions] == [place for place in range(len(PROMPTS)) for _ in range(3)]
    for one in completions:
        assert (one.stop == "end") == (one.ids[-1] == END)
        assert one.stop == "end" or len(one.ids) == min(9, CONTEXT - len(PROMPTS[one.group]))
        assert len(one.ids) == len(one.log_probs)
    assert {one.stop for one in completions} == {"end", "length"}


def test_the_seed_decides_and_every_prompt_and_sample_has_its_own(engine: Any, student: Any) -> None:
    engine.take(student, 0)
    same = [[3, 4, 5]] * 3
    first, again, other = (engine.generate(same, Sampling(samples_per_prompt=3), seed) for seed in (1, 1, 2))
    assert first == again
    assert len({tuple(one.log_probs) for one in [*first, *other]}) == 18


def test_greedy_samples_are_drawn_once(vllm: Any, engine: Any, student: Any) -> None:
    engine.take(student, 0)
    completions = engine.generate(PROMPTS, Sampling(temperature=0, samples_per_prompt=3), 0)
    assert [one.group for one in completions] == [place for place in range(len(PROMPTS)) for _ in range(3)]
    assert len(vllm.prompts) == len(PROMPTS)


@pytest.mark.parametrize("when", ["before", "while it writes", "after it wrote"])
def test_a_restart_loses_no_completion_and_sends_the_weights_again(
    vllm: Any, engine: Any, student: Any, when: str, tmp_path: Path
) -> None:
    step(student)
    undisturbed = expected(student, vllm, tmp_path, 4)
    engine.take(student, 4)
    assert vllm.sent == 1

    def restart(data: Any) -> None:
        vllm.restart()

    if when == "before":
        vllm.restart()
    elif when == "while it writes":
        vllm.script["v1/completions"] = [lambda data: None, restart]
    else:
        vllm.script["weight_info"] = [lambda data: None, restart]
    assert engine.generate(PROMPTS, SAMPLING, 7) == undisturbed
    assert vllm.sent == 2
    assert vllm.weights == pytest.approx(total(student), abs=1e-4)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_only_what_failed_is_asked_again(vllm: Any, engine: Any, student: Any, status: int, tmp_path: Path) -> None:
    undisturbed = expected(student, vllm, tmp_path, 0)
    engine.take(student, 0)
    vllm.script["v1/completions"] = [lambda data: JSONResponse({"detail": "busy"}, status)]
    assert engine.generate(PROMPTS, SAMPLING, 7) == undisturbed
    assert len(vllm.prompts) == len(PROMPTS) and vllm.sent == 1


def test_failures_end_with_the_patience(vllm: Any, engine: Any, student: Any) -> None:
    engine.take(student, 0)
    busy = JSONResponse({"detail": "busy"}, 503)
    vllm.script["v1/completions"] = [lambda data: busy] * 10_000
    began = time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"no answer within 2 s \(503"):
        engine.generate(PROMPTS, SAMPLING, 0)
    assert 1.5 < time.monotonic() - began < 10


def test_progress_renews_the_patience(vllm: Any, engine: Any, student: Any, tmp_path: Path) -> None:
    impatient = VLLMServerEngine(
        Remote(Endpoint(vllm.url, patience=0.3, concurrency=1)), FileTransfer(tmp_path), frozenset({END})
    )
    impatient.take(student, 0)
    busy = JSONResponse({"detail": "busy"}, 503)
    prompts = [[3]] * 8  # of those that are missing, the first is answered and the others are not
    vllm.script["v1/completions"] = [
        answer for missing in range(8, 0, -1) for answer in [lambda data: None, *[lambda data: busy] * (missing - 1)]
    ]
    began = time.monotonic()
    assert len(impatient.generate(prompts, SAMPLING, 0)) == 24
    assert time.monotonic() - began > 0.3
    impatient.close()


def test_two_runs_on_one_server_end_in_words(vllm: Any, engine: Any, student: Any) -> None:
    engine.take(student, 0)

    def stolen(data: Any) -> None:
        vllm.name = "kdlm-another-1"

    vllm.script["v1/completions"] = [stolen] * 10_000
    with pytest.raises(ServerUnavailable, match="restarted, or sent others"):
        engine.generate(PROMPTS, SAMPLING, 0)


def test_an_update_that_was_broken_off_does_not_keep_the_next_from_beginning(
    vllm: Any, engine: Any, student: Any
) -> None:
    vllm.active = True
    engine.take(student, 0)
    assert vllm.weights == pytest.approx(total(student), abs=1e-4)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "raw log-probabilities": ({"processed": False}, ValueError, "add --logprobs-mode processed_logprobs"),
    "no developer mode": ({"developer": False}, ServerUnavailable, "404 .*developer mode.*docs/vllm_rollouts.md"),
    "no transfer": ({"transfer": False}, ServerUnavailable, "Weight transfer not configured.*docs/vllm_rollouts.md"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_server_that_was_started_otherwise_is_refused_with_what_to_change(
    vllm: Any, engine: Any, student: Any, case: str
) -> None:
    changes, error, words = WRONG[case]
    vars(vllm).update(changes)
    with pytest.raises(error, match=words):
        engine.take(student, 0)


def choice(**changes: Any) -> Any:
    one = {"index": 0, "token_ids": [3, END], "logprobs": {"token_logprobs": [-1.0, -2.0]}} | changes
    return {"choices": [one]}


MALFORMED: dict[str, Any] = {
    "no choices": {"object": "nothing"},
    "too few samples": {"choices": []},
    "no ids": choice(token_ids=None),
    "no log-probabilities": choice(logprobs=None),
    "of other lengths": choice(token_ids=[3]),
    "not finite": choice(logprobs={"token_logprobs": [-1.0, None]}),
    "no probability": choice(logprobs={"token_logprobs": [-1.0, 0.5]}),
    "too long": choice(token_ids=[3] * 7, logprobs={"token_logprobs": [-1.0] * 7}),
    "empty": choice(token_ids=[], logprobs={"token_logprobs": []}),
}


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED)
def test_an_answer_that_is_not_sound_ends_at_once(vllm: Any, engine: Any, student: Any, answer: Any) -> None:
    engine.take(student, 0)
    vllm.script["v1/completions"] = [lambda data: JSONResponse(answer)]
    with pytest.raises(ServerUnavailable, match="/v1/completions: "):
        engine.generate([[3]], Sampling(max_new_tokens=6), 0)


def test_a_prompt_without_room_is_named(engine: Any, student: Any) -> None:
    engine.take(student, 0)
    for prompt in ([], [3] * CONTEXT):
        with pytest.raises(ValueError, match=f"prompt 1 has {len(prompt)} tokens"):
            engine.generate([[3], prompt], SAMPLING, 0)


def test_another_version_is_warned_of(vllm: Any, engine: Any, student: Any, caplog: Any) -> None:
    vllm.version = "0.30.0+cpu"
    engine.take(student, 0)
    assert not caplog.records
    vllm.restart()
    vllm.version = "0.29.1"
    engine.take(student, 1)
    assert any("vLLM 0.29.1: weight transfer was tested with 0.30.0" in line for line in caplog.messages)


def test_weights_go_in_files_of_bounded_size(monkeypatch: Any, tmp_path: Path, student: Any) -> None:
    monkeypatch.setattr("kdlm.rollouts.weight_transfer.SHARD", 600)
    transfer = FileTransfer(tmp_path)
    for _ in range(2):
        transfer.keep(student)
        shards = [load_file(file) for file in transfer.files]
        assert len(shards) > 2
        assert all(len(shard) == 1 or sum(one.nbytes for one in shard.values()) <= 600 for shard in shards)
        assert sum(float(one.sum()) for shard in shards for one in shard.values()) == pytest.approx(total(student))
        assert len(list(transfer.folder.iterdir())) == len(shards)
        step(student)
    transfer.close()


class Tokenizer(nn.Module):
    eos_token_id = END


def test_the_section_sends_the_key_and_starts_with_the_students_weights(
    vllm: Any, student: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("ROLLOUT_KEY", "secret")
    student.generation_config.eos_token_id = None
    section = VLLMServerSection(url=vllm.url, key_env="ROLLOUT_KEY", folder=tmp_path)
    engine = section.build(student, Tokenizer(), torch.device("cpu"))
    assert vllm.weights == pytest.approx(total(student), abs=1e-4)
    assert all(header["authorization"] == "Bearer secret" for header in vllm.headers)
    engine.close()
    with pytest.raises(ServerUnavailable, match=r"^rollouts\.engine\.url: http://127\.0\.0\.1:9: no answer within"):
        VLLMServerSection(url="http://127.0.0.1:9", patience=0.1).build(student, Tokenizer(), torch.device("cpu"))
    monkeypatch.delenv("ROLLOUT_KEY")
    with pytest.raises(ValueError, match=r"rollouts\.engine\.key_env: .*ROLLOUT_KEY is not set"):
        section.build(student, Tokenizer(), torch.device("cpu"))


def test_several_training_processes_are_refused(monkeypatch: Any) -> None:
    one_process()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="one training process"):
        one_process()
