"""What holds of every engine that keeps weights of its own, asked of it beside transformers with the same weights.

Run as a script, `engine_laws.py KIND FOLDER`, it asks it of vLLM in process: by an interpreter that has vLLM.
"""

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kdlm.rollouts import Completion, Sampling

BOUND = 1e-3
"""The most that an engine's log-probability may be off that of the weights it should hold, in nats."""
KINDS = ("tied", "untied", "experts", "lora")
CONTEXT = 128
PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11], [20] * 100, [30, 31] * 8]


def student_of(kind: str, folder: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{'untied' if kind == 'lora' else kind}")
    if kind != "lora":
        return model
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=64, target_modules="all-linear"))


def log_probs(student: Any, prompt: Sequence[int], ids: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """Return the log-probability of each token of a completion under what transformers would draw from."""
    with torch.no_grad():
        logits = student(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
    warpers = LogitsProcessorList()
    if sampling.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.temperature and sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.temperature and sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    scores = warpers(torch.tensor([[0]]), logits).log_softmax(-1)
    return scores.gather(-1, torch.tensor(ids)[:, None])[:, 0]


def gap(student: Any, completions: Sequence[Completion], sampling: Sampling) -> float:
    """Return the largest difference between the engine's log-probabilities and those of a model's weights."""
    assert completions
    return max(
        float((log_probs(student, PROMPTS[one.group], one.ids, sampling) - torch.tensor(one.log_probs)).abs().max())
        for one in completions
    )


def train_on(student: Any, optimizer: Any, completions: Sequence[Completion]) -> None:
    """Make a plain step: the completions of the first group become less likely, the others more."""
    loss = torch.zeros(())
    for one in completions:
        prompt = PROMPTS[one.group]
        logits = student(input_ids=torch.tensor([[*prompt, *one.ids]])).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1).gather(-1, torch.tensor(one.ids)[:, None]).mean()
        loss = loss + (own if one.group == 0 else -own)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def the_newest_weights_are_held(engine: Any, student: Any, steps: int) -> dict[str, float]:
    """Train `steps` steps, each on what the engine wrote with the weights of the step before."""
    optimizer = torch.optim.AdamW([weight for weight in student.parameters() if weight.requires_grad], lr=1e-2)
    sampling = Sampling(max_new_tokens=12)
    new, old, seconds = [], [], []
    written: list[Completion] = []
    for step in range(steps):
        began = time.perf_counter()
        engine.take(student, step)
        seconds.append(time.perf_counter() - began)
        before, written = written, engine.generate(PROMPTS, sampling, step)
        assert {one.version for one in written} == {step}
        new.append(gap(student, written, sampling))
        if before:
            old.append(gap(student, before, sampling))  # what was written with the weights of a step ago
        train_on(student, optimizer, written)
    assert max(new) < BOUND < 10 * BOUND < min(old)
    stale = engine.generate(PROMPTS, sampling, steps)
    assert {one.version for one in stale} == {steps - 1}
    assert gap(student, stale, sampling) > 10 * BOUND  # it keeps what it took, also while the student changes
    return {"worst_new": max(new), "least_old": min(old), "median_take_s": sorted(seconds)[steps // 2]}


def greedy_is_that_of_transformers(engine: Any, student: Any, ends: list[int]) -> None:
    engine.take(student, 0)
    sampling = Sampling(temperature=0, max_new_tokens=40, samples_per_prompt=2)
    completions = engine.generate(PROMPTS, sampling, 0)
    assert gap(student, completions, sampling) < BOUND
    assert [one.group for one in completions] == [0, 0, 1, 1, 2, 2, 3, 3]
    for one in completions:
        ids = torch.tensor([PROMPTS[one.group]])
        theirs = student.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=min(40, CONTEXT - ids.shape[1]),
            eos_token_id=ends,
            pad_token_id=0,
        )
        assert one.ids == theirs[0, ids.shape[1] :].tolist()
        assert one.stop == ("end" if one.ids[-1] in ends else "length")


def what_is_drawn_has_the_log_probabilities_it_says(engine: Any, student: Any) -> None:
    assert engine.generate([], Sampling(), 0) == []
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 7}, {"top_p": 0.8}]
    for options in [*ways, {"top_k": 9, "top_p": 0.9}]:
        sampling = Sampling(max_new_tokens=16, samples_per_prompt=3, **options)
        first, again, other = (engine.generate(PROMPTS, sampling, seed) for seed in (1, 1, 2))
        assert [one.ids for one in first] == [one.ids for one in again] != [one.ids for one in other]
        assert len({tuple(one.ids) for one in first}) > len(PROMPTS)
        assert gap(student, first, sampling) < BOUND, options


def another_thread_may_ask_while_the_student_trains(engine: Any, student: Any) -> None:
    sampling = Sampling(max_new_tokens=24, samples_per_prompt=4)
    engine.take(student, 0)
    alone = engine.generate(PROMPTS, sampling, 5)
    optimizer = torch.optim.SGD([weight for weight in student.parameters() if weight.requires_grad], lr=1e-2)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(engine.generate, PROMPTS, sampling, 5)
        for _ in range(3):
            train_on(student, optimizer, alone[:4])
        assert [one.ids for one in beside.result()] == [one.ids for one in alone]


def all_of(engine: Any, student: Any, ends: list[int], steps: int = 20) -> dict[str, float]:
    found = the_newest_weights_are_held(engine, student, steps)
    greedy_is_that_of_transformers(engine, student, ends)
    what_is_drawn_has_the_log_probabilities_it_says(engine, student)
    another_thread_may_ask_while_the_student_trains(engine, student)
    return found


def frequent(student: Any) -> int:
    """Return a token that greedy completions have after a few others, to end them early."""
    ids = torch.tensor([PROMPTS[0]])
    drawn = student.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    return int(drawn[0, -1])


def main(kind: str, folder: str) -> None:
    from kdlm.rollouts.vllm_local import VLLMSection

    student, tokenizer = student_of(kind, folder), AutoTokenizer.from_pretrained(f"{folder}/tied")
    ends = [tokenizer.eos_token_id, frequent(student)]
    student.generation_config.eos_token_id = ends
    random = torch.get_rng_state()
    began = time.perf_counter()
    engine = VLLMSection(options={"enforce_eager": True}).build(student, tokenizer, torch.device("cpu"))
    start = time.perf_counter() - began
    engine.generate(PROMPTS, Sampling(max_new_tokens=4), 0)
    assert torch.equal(random, torch.get_rng_state()), "vLLM drew from the run's random numbers"
    print(json.dumps(all_of(engine, student, ends) | {"start_s": start}))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
