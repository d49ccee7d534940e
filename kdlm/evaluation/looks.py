"""What `kdlm check` looks at of the section `evaluation`."""

from collections.abc import Iterator
from typing import Any

from kdlm.evaluation.comparison import possible, refusal
from kdlm.evaluation.section import unknown
from kdlm.losses import measures_for
from kdlm.methods import AlignedMethod, Method, TokenMethod


def looked_at(recipe: Any, method: Method | None) -> Iterator[str]:
    """Look at what evaluation asks of data, teacher and training arguments."""
    section = recipe.evaluation
    if section is None:
        return
    text = "labels" in recipe.data.provides and isinstance(method, TokenMethod)
    problems = []
    if text and not any(getattr(recipe.data, key, None) for key in ("eval", "eval_rows", "eval_fraction")):
        problems.append(
            "evaluation: there are no rows to evaluate: set data.eval, data.eval_rows or data.eval_fraction"
        )
    if section.reads_text and (not text or "unmasking" in method.needs):  # pyright: ignore[reportOptionalMemberAccess]
        problems.append("evaluation: beside rows and best it asks for what only a causal language model has")
    try:
        section.settle(recipe.training.build(output_dir=str(recipe.run_dir), seed=recipe.seed))
    except ValueError as error:
        problems.append(str(error))
    if text and isinstance(method, TokenMethod):
        problems.extend(_unknown_names(recipe, section, method))
    if problems:
        raise ValueError("\n".join(problems))
    rows = "all rows" if section.rows is None else f"at most {section.rows} rows"
    yield f"evaluation: {rows}{f', best checkpoint by {section.best}' if section.best else ''}"


def _unknown_names(recipe: Any, section: Any, method: TokenMethod) -> Iterator[str]:
    """Yield what is wrong with the names of metrics, where those that there are can be known."""
    given = getattr(recipe.teacher, "signals", frozenset())  # of a teacher of one's own it is not known
    kinds: list[Any] = [None] if recipe.teacher is None or isinstance(method, AlignedMethod) else list(given)
    if not kinds:
        return
    known = dict.fromkeys(name for kind in kinds for name in possible(kind))
    wrong = [name for name in section.measures if name not in known]
    yield from (f"evaluation.measures: {refusal(name, known)}" for name in wrong)
    default = dict.fromkeys(name for kind in kinds for name in measures_for(kind))
    if section.gap_closed is not False and "teacher_cross_entropy" not in default:
        yield "evaluation.gap_closed: it takes a teacher of the same tokenizer, and all of its distribution"
    if section.best is None or type(method).evaluate is not TokenMethod.evaluate:
        return
    more = {
        "kl_to_start": section.start,
        "other_cross_entropy": section.other,
        "other_kl_to_start": section.other and section.start,
        "gap_closed": section.gap_closed is not False,
        **dict.fromkeys(("length", "truncated", "repetition_4", "distinct_1", "distinct_2"), section.generations),
        "score": section.generations and recipe.verifier,
    }
    asked = [*default, *section.measures, *(name for name, has in more.items() if has)]
    reported = dict.fromkeys(["loss", *method.token_losses, *asked])
    if section.best not in reported and not section.best.startswith("rollout_"):
        missing = "; it takes measures of its name" if section.best in known else ""
        yield f"evaluation.best: {unknown(section.best, reported)}{missing}"
