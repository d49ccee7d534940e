"""The speed of models beside each other: what is counted, in which order, and what it is divided by."""

import time
from typing import Any

import pytest
import torch
from job_files import MODELS, TEACHER, job_in

from kdlm import cli
from kdlm.jobs import speed as room
from kdlm.jobs.running import speed
from kdlm.jobs.speed import READINGS, Speed, measure
from kdlm.models import named

HERE = {name: MODELS[name] for name in ("teacher", "student")}


class Slowed:
    """A model that takes a known time for each token of its input, and notes its calls."""

    def __init__(self, model: Any, seconds: float, calls: list[tuple[str, tuple[int, ...]]], name: str):
        self.model, self.seconds, self.calls, self.name = model, seconds, calls, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids: torch.Tensor, **rest: Any) -> Any:
        self.calls.append((self.name, tuple(input_ids.shape)))
        time.sleep(self.seconds * input_ids.shape[1])
        return self.model(input_ids=input_ids, **rest)


def test_models_take_turns_and_read_and_write_what_was_asked():
    model, calls = named(TEACHER).load().eval(), []
    both = {name: Slowed(model, 0.0, calls, name) for name in ("a", "b")}
    section = Speed(batch_sizes=[3], prompt_tokens=10, new_tokens=4, repeats=2)
    found = measure(section, both, "a")
    once = [(3, 10), *[(3, 1)] * 3]
    order = ["a", "b", "b", "a", "a", "b"]
    assert calls == [(name, shape) for name in order for shape in once]
    assert set(found["b"]["batch"]["3"]) == {*READINGS, "against_teacher"}
    assert set(found["a"]["batch"]["3"]) == set(READINGS)


def test_rates_are_tokens_by_the_clock_and_ratios_the_teachers(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    model = named(TEACHER).load().eval()
    section = Speed(batch_sizes=[2], prompt_tokens=10, new_tokens=4, repeats=3)
    found = measure(section, {"teacher": model, "student": model}, "teacher")["student"]["batch"]["2"]
    assert found["prefill_tokens_per_second"] == {
        "value": 20.0,
        "error": 0.0,
    }  # every reading is one tick after another
    assert found["decode_tokens_per_second"] == {"value": 6.0, "error": 0.0}
    assert found["first_token_seconds"]["value"] == 1.0
    assert found["against_teacher"]["decode_tokens_per_second"] == {"value": 1.0, "error": 0.0}


def test_what_is_written_is_what_generate_writes():
    """The loop that is timed is greedy decoding with a cache."""
    model = named(TEACHER).load().eval()
    prompt = torch.arange(5, 17)[None]
    written = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, 12:]
    ids, said = [], None
    with torch.inference_mode():
        for _ in range(6):
            past = {} if said is None else {"past_key_values": said.past_key_values}
            said = model(input_ids=prompt if said is None else ids[-1], use_cache=True, logits_to_keep=1, **past)
            ids.append(said.logits[:, -1:].argmax(-1))
    assert torch.cat(ids, 1)[0].tolist() == written.tolist()


@pytest.mark.skipif(not room._LINUX, reason="the resident set is Linux's")
def test_peak_memory_is_the_weights_and_what_is_taken_on_top():
    model = named(TEACHER).load().eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = room._Memory(model)
    assert weights <= memory.weights < 1.01 * weights  # some tables of positions
    block = torch.ones(64 * 2**20 // 4)
    del block
    assert memory.peak() - memory.weights == pytest.approx(64 * 2**20, rel=0.1)


def test_a_job_measures_the_models_of_this_process_and_their_size_on_disk(tmp_path):
    job = job_in(tmp_path, "speed={prompt_tokens: 8, new_tokens: 2, repeats: 2, batch_sizes: [1]}", models=HERE)
    found = speed(job)
    assert set(found) == {"teacher", "student"} and found["teacher"]["bytes"] > found["student"]["bytes"] > 1000


def test_prompts_that_do_not_fit_a_model_are_said(tmp_path):
    with pytest.raises(ValueError, match=r"speed\.prompt_tokens: 4000 and 32 new ones do not fit the 1024 positions"):
        speed(job_in(tmp_path, "speed={prompt_tokens: 4000}", models=HERE))


def test_what_cannot_be_measured_is_said_before_anything_is_evaluated(tmp_path, capsys):
    job_in(tmp_path, models={"m": {"name": "vllm", "path": TEACHER}})
    assert cli.main(["eval", str(tmp_path / "job.yaml"), "speed={}"]) == 2
    assert "speed: it is that of models in this process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
