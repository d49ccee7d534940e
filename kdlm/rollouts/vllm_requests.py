"""What both vLLM engines ask and how they read the answer: the same for `SamplingParams` and for the HTTP API."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdlm.rollouts.engine import Completion, Sampling


@dataclass(frozen=True)
class Ends:
    """What bounds a completion: the tokens that end it, and the tokens that prompt and completion may have together."""

    ids: frozenset[int]
    context: int


def end_ids(student: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a completion: the tokenizer's, and those of the student's generation config.

    Raises ValueError where there are none: every completion would run to its limit.
    """
    own = getattr(getattr(student, "generation_config", None), "eos_token_id", None)
    named = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    found = frozenset(int(token) for token in named if token is not None)
    if not found:
        raise ValueError("student: neither its tokenizer nor its generation_config names an end token")
    return found


def requests(prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, ends: Ends) -> list[dict[str, Any]]:
    """Return what is asked after each prompt.

    Every request has a seed of its own, made of `seed` and the prompt's place; vLLM adds the number of the sample.
    All that a server's own defaults could change is said.

    Raises ValueError where a prompt is empty or leaves no room for a completion.
    """
    asked = []
    for place, prompt in enumerate(prompts):
        if not 0 < len(prompt) < ends.context:
            raise ValueError(
                f"prompt {place} has {len(prompt)} tokens, and the engine reads {ends.context}: give it at least one "
                "and leave room for a completion (data.max_length)"
            )
        digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
        asked.append(
            {
                "n": 1 if sampling.temperature == 0 else sampling.samples_per_prompt,  # greedy samples are all alike
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "max_tokens": min(sampling.max_new_tokens, ends.context - len(prompt)),
                "seed": int.from_bytes(digest[:7]),
                "logprobs": 0,  # that of the token itself
                "stop_token_ids": sorted(ends.ids),
                "ignore_eos": True,  # the student says what ends a text, not the files that the engine was started with
            }
        )
    return asked


def completions(
    samples: Sequence[tuple[list[int], list[float]]], place: int, sampling: Sampling, ends: Ends, version: int
) -> list[Completion]:
    """Return the completions of one prompt, from the ids and log-probabilities of its samples.

    Raises ValueError where they are not what was asked for.
    """
    expected = 1 if sampling.temperature == 0 else sampling.samples_per_prompt
    if len(samples) != expected:
        raise ValueError(f"{len(samples)} completions of a prompt, {expected} were asked for")
    made = []
    for ids, log_probs in samples:
        if not 0 < len(ids) <= sampling.max_new_tokens or len(ids) != len(log_probs):
            raise ValueError(
                f"{len(ids)} ids and {len(log_probs)} log-probabilities, of {sampling.max_new_tokens} at most"
            )
        if not all(math.isfinite(value) and value <= 1e-3 for value in log_probs):
            raise ValueError(f"{log_probs} are no log-probabilities")
        made.append(Completion(ids, log_probs, "end" if ids[-1] in ends.ids else "length", place, version))
    return made * (sampling.samples_per_prompt // expected)
