"""Generations: what a student writes after prompts, in figures."""

from collections.abc import Sequence
from typing import Any

from kdlm.estimates import Estimate, ratio
from kdlm.quality import distinct, repetition
from kdlm.rollouts import Completion, GenerateSection, Sampling


def measure_generations(
    student: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Let a student complete prompts and return the figures of what it wrote, with standard errors over the prompts.

    Args:
        student: a causal language model; left as it was.
        tokenizer: the student's, for its end token.
        prompts: token ids (`kdlm.rollouts.prompt_of` takes them from rows of data).
        sampling: how tokens are drawn; by default at temperature 1, up to 256 of them.
        seed: of the drawing, which leaves torch's own generators alone.
        batch_size: completions drawn at once.

    Returns:
        `completions` and `prompts`, their numbers, and `metrics` by name, each with `value` and `error`. `distinct_1`
        and `distinct_2` are of all completions together, and have no error.

    Raises ValueError without a prompt, for an empty one, and for one that leaves no room in the model's context.
    """
    if not prompts:
        raise ValueError("prompts: there are none, so there is nothing to complete")
    engine = GenerateSection(batch_size=batch_size).build(student, tokenizer, student.device, copied=False)
    engine.take(student, 0)
    try:
        written = engine.generate(prompts, sampling or Sampling(), seed)
    finally:
        engine.close()
    return {
        "prompts": len(prompts),
        "completions": len(written),
        "metrics": {name: figure.as_json() for name, figure in figures(written, len(prompts)).items()},
    }


def figures(written: Sequence[Completion], prompts: int) -> dict[str, Estimate]:
    """Return the figures of completions of some prompts: means with errors over the prompts, and distinct-n."""
    of_one = {
        "length": lambda one: float(len(one.ids)),
        "truncated": lambda one: float(one.stop == "length"),
        "repetition_4": lambda one: repetition(one.ids),
    }
    counts = [0.0] * prompts
    for one in written:
        counts[one.group] += 1
    found = {}
    for name, reading in of_one.items():
        sums = [0.0] * prompts
        for one in written:
            sums[one.group] += reading(one)
        found[name] = ratio(sums, counts)
    ids = [one.ids for one in written]
    return found | {f"distinct_{n}": Estimate(distinct(ids, n), float("nan")) for n in (1, 2)}
