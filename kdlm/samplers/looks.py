"""What `kdlm check` looks at of the section `sampler`."""

from collections.abc import Iterator
from typing import Any

from kdlm.data import DataSection
from kdlm.evaluation.comparison import possible
from kdlm.methods import AlignedMethod, Method, TokenMethod
from kdlm.samplers.ddk import DomainGaps
from kdlm.samplers.subsets import FixedSubset, tied


def looked_at(recipe: Any, method: Method | None) -> Iterator[str]:
    """Look at what a sampler asks of data, method, teacher and training arguments."""
    section = recipe.sampler
    if section is None:
        return
    problems = []
    if getattr(recipe.data, "streaming", False):
        problems.append("sampler: a stream has no rows to choose from: use data.streaming: false")
    if recipe.privacy is not None:
        problems.append("sampler: DP-SGD draws rows by chance, which its promise rests on: remove one of the sections")
    if recipe.method.name in ("grpo", "rlad"):
        problems.append(f"sampler: {recipe.method.name} draws its prompts as TRL does: remove the section")
    if isinstance(section, DomainGaps):
        problems.extend(_gaps(recipe, method))
    if isinstance(section, FixedSubset):
        problems.extend(_columns(recipe))
    try:
        tied(recipe.losses, section)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    if isinstance(section, DomainGaps):
        yield f"sampler: ddk, shares anew every {section.every} steps"
    else:
        yield f"sampler: {section.name}, {section.fraction:g} of the rows"


def _gaps(recipe: Any, method: Method | None) -> Iterator[str]:
    """Yield what keeps shares from following the gaps of the domains."""
    data, kinds = recipe.data, getattr(recipe.teacher, "signals", frozenset())
    if not isinstance(data, DataSection) or not isinstance(method, TokenMethod) or "unmasking" in method.needs:
        yield "sampler: ddk compares perplexities: it takes text and a causal language model"
        return
    if isinstance(method, AlignedMethod):
        yield "sampler: ddk compares perplexities a token: it takes a teacher with the student's tokenizer"
    elif recipe.teacher is None or any("teacher_cross_entropy" not in possible(kind) for kind in kinds):
        yield "sampler: ddk takes a teacher that says how likely it finds every token"
    if data.packing == "pack":
        yield "data.packing: a packed row mixes domains, which ddk draws apart: use padding_free, which pads no more"
    yield from (
        f"data.train.{place}.weight: ddk sets the shares of the domains: leave it out"
        for place, source in enumerate(data.train)
        if source.weight is not None
    )
    domains = {source.domain_name for source in data.train}
    if len(domains) == 1 and None not in domains:
        yield "data.train: ddk weighs several domains: give sources a `domain` each, or map a column to it"
    if recipe.training.build(output_dir=str(recipe.run_dir), seed=recipe.seed).max_steps <= 0:
        yield "training.max_steps: missing; with ddk an epoch is the steps between two measurements"
    if recipe.rollouts is not None and recipe.rollouts.reuse > 1:
        yield "rollouts.reuse: with ddk every sample is trained on once: use reuse: 1"


def _columns(recipe: Any) -> Iterator[str]:
    """Yield what is wrong with the columns that a part of the rows is chosen by, where that can be known."""
    section, data = recipe.sampler, recipe.data
    if not isinstance(data, DataSection):
        return
    if section.by == "score" and (lacking := [s.path for s in data.train if "score" not in s.columns]):
        yield f"sampler.by: {lacking[0]} has no score: map one of its columns, e.g. columns: {{score: forgetting}}"
    if (section.by or section.balance) and data.packing == "pack":
        yield "data.packing: a packed row has several scores and domains: use padding_free, which pads no more"
