"""measure: decode prompts with a draft, without it, and with the draft alone, and count."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kdlm.models.prediction import LanguageModel
from kdlm.speculation.decoding import Decoded, Decoder, decoding
from kdlm.speculation.report import Counts, Position, SpeculationReport, Sums, expected_block_efficiency


def measure(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    drafted: int = 5,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    repeats: int = 1,
    seed: int = 0,
) -> SpeculationReport:
    """Decode every prompt speculatively, with the target alone and with the draft alone, and return what it took.

    Args:
        target, draft: causal LMs of one tokenizer, on one device or two; left as they were.
        prompts: token ids; at least two prompts, from which the standard errors come.
        drafted: tokens that the draft proposes in a block (gamma).
        temperature: of both models; 0 is greedy. Decode as the target will be used.
        max_new_tokens: length of a text that does not end by itself. The last block of a text has no room for all
            `drafted` proposals, which lowers block efficiency a little: much longer than `drafted` is better.
        repeats: times that each prompt is decoded; more for steadier clocks.
        seed: of the sampling. The random state is put back.

    The three decodings of a prompt follow each other, in turning order, so that a machine that slows down slows all
    of them. The first prompt is decoded once more before, uncounted. Batch size is 1, as it is in assisted generation.
    Raises ValueError for numbers out of range, fewer than two prompts, an empty prompt, or one that does not fit.
    """
    models = {"target": target, "draft": draft}
    _look(models, prompts, temperature, drafted=drafted, max_new_tokens=max_new_tokens, repeats=repeats)
    devices = {model.device for model in models.values() if model.device.type == "cuda"}
    sums = [Sums(float) for _ in prompts]
    with (
        torch.random.fork_rng(devices=sorted(devices, key=str)),
        decoding(target, draft, drafted=drafted, temperature=temperature) as decoder,
    ):
        torch.manual_seed(seed)
        _count(decoder, prompts[0], max_new_tokens, 0, Sums(float))
        for turn in range(repeats):
            for index, prompt in enumerate(prompts):
                _count(decoder, prompt, max_new_tokens, turn + index, sums[index])
    asked = {"drafted": drafted, "temperature": temperature, "prompts": len(prompts), "repeats": repeats}
    return _report(Counts(sums), **asked, max_new_tokens=max_new_tokens, seed=seed)


def _count(decoder: Decoder, prompt: Sequence[int], length: int, turn: int, sums: Sums) -> None:
    """Decode one prompt in three ways, the first of which turns, and add up what happened."""
    ways: dict[str, Callable[[], Any]] = {
        "speculative": lambda: decoder.speculative(prompt, length),
        "target": lambda: decoder.alone(decoder.target, prompt, length),
        "draft": lambda: decoder.alone(decoder.draft, prompt, length),
    }
    names, texts = list(ways), {}
    for name in names[turn % 3 :] + names[: turn % 3]:
        began = time.perf_counter()
        texts[name] = ways[name]()  # ends with the tokens on the host, so none of the device's work is left out
        sums[f"{name} seconds"] += time.perf_counter() - began
    text: Decoded = texts["speculative"]
    sums["passes"] += len(text.blocks)
    sums["speculative tokens"] += len(text.ids)
    sums["target tokens"] += len(texts["target"])
    sums["draft tokens"] += len(texts["draft"])
    sums["same"] += text.ids == texts["target"]
    for block in text.blocks:
        reached = {"proposed": len(block.proposed), "tested": block.tested, "accepted": block.accepted}
        for what, number in reached.items():
            sums[what] += number
            for place in range(1, number + 1):
                sums[f"{what} {place}"] += 1


def _report(counts: Counts, drafted: int, temperature: float, **asked: int) -> SpeculationReport:
    def efficiency(sums: Sums) -> float:
        return sums["speculative tokens"] / sums["passes"]

    def cost(sums: Sums) -> float:
        return (sums["draft seconds"] / sums["draft tokens"]) / (sums["target seconds"] / sums["target tokens"])

    def speed(sums: Sums, who: str) -> float:
        return sums[f"{who} tokens"] / sums[f"{who} seconds"]

    def place(number: int) -> Position:
        numbers = {what: int(counts.sums[f"{what} {number}"]) for what in ("proposed", "tested", "accepted")}
        rate = counts.estimate(lambda sums: sums[f"accepted {number}"] / sums[f"tested {number}"])
        return Position(**numbers, acceptance=rate)

    return SpeculationReport(
        drafted=drafted,
        temperature=temperature,
        **asked,
        target_passes=int(counts.sums["passes"]),
        emitted=int(counts.sums["speculative tokens"]),
        proposed=int(counts.sums["proposed"]),
        accepted=int(counts.sums["accepted"]),
        positions=tuple(place(number) for number in range(1, drafted + 1)),
        acceptance=counts.estimate(lambda sums: sums["accepted"] / sums["tested"]),
        accepted_share=counts.estimate(lambda sums: sums["accepted"] / sums["proposed"]),
        block_efficiency=counts.estimate(efficiency),
        expected_block_efficiency=counts.estimate(
            lambda sums: expected_block_efficiency(sums["accepted"] / sums["tested"], drafted)
        ),
        cost_ratio=counts.estimate(cost),
        speedup=counts.estimate(lambda sums: speed(sums, "speculative") / speed(sums, "target")),
        expected_speedup=counts.estimate(lambda sums: efficiency(sums) / (cost(sums) * drafted + 1)),
        tokens_per_second=counts.estimate(lambda sums: speed(sums, "speculative")),
        target_tokens_per_second=counts.estimate(lambda sums: speed(sums, "target")),
        draft_tokens_per_second=counts.estimate(lambda sums: speed(sums, "draft")),
        seconds=counts.sums["speculative seconds"],
        target_seconds=counts.sums["target seconds"],
        draft_seconds=counts.sums["draft seconds"],
        same_texts=int(counts.sums["same"]) if temperature == 0 else None,
    )


def _look(
    models: dict[str, LanguageModel], prompts: Sequence[Sequence[int]], temperature: float, **least_one: int
) -> None:
    """Raise ValueError for what cannot be measured."""
    for name, value in least_one.items():
        if value < 1:
            raise ValueError(f"{name}: {value}, expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: {temperature}, expected 0 (greedy) or a positive number")
    if len(prompts) < 2:
        raise ValueError(f"prompts: {len(prompts)}, expected at least 2: standard errors are over the prompts")
    if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompts: number {empty[0]} (from 0) has no tokens, and a text must begin with one")
    longest, length = max(map(len, prompts)), least_one["max_new_tokens"]
    for name, model in models.items():
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and longest + length > room:
            raise ValueError(
                f"max_new_tokens: {length} after a prompt of {longest} tokens do not fit the {name}'s {room} positions"
            )
