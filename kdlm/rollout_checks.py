"""What `kdlm check` looks at where a student trains on its own text: the engine, the environment, who judges."""

from collections.abc import Iterator
from typing import Any

from kdlm.methods import GDSD, GRPO, AlignedMethod, Method, RewardMethod
from kdlm.recipe import Recipe
from kdlm.rollouts import Sampling
from kdlm.section import Custom
from kdlm.teachers import LocalTeacherSection, SandboxTeacherSection, teachers_of


def rollouts(recipe: Recipe, method: Method | None) -> Iterator[str]:
    """Look at what training on the student's own text needs of the other sections."""
    wanted = method is not None and "rollouts" in method.needs
    section, name = recipe.rollouts, recipe.method.name
    written = recipe.evaluation is not None and recipe.evaluation.generations is not None
    if section is None and recipe.verifier is not None and not written:
        raise ValueError(
            "verifier: it judges the student's own text, and there is none: add a section `rollouts`, or "
            "evaluation.generations"
        )
    if section is None:
        if wanted:
            raise ValueError(
                f"rollouts: missing; {name} trains on the student's own text: add a section, e.g. rollouts: {{}}"
            )
        return
    if method is not None and not wanted and not isinstance(recipe.method, Custom):
        other = "set method.student_share" if isinstance(method, AlignedMethod) else "use gkd"
        raise ValueError(f"rollouts: {name} trains on the data's text only: remove the section, or {other}")
    problems = []
    if recipe.data.packing == "pack":
        problems.append("data.packing: rows are prompts to complete and cannot be packed: use none or padding_free")
    if section.reuse > 1 and recipe.data.streaming:
        problems.append("rollouts.reuse: a stream cannot be gone over again: use reuse: 1, or data.streaming: false")
    for key, teacher in teachers_of(recipe.teacher):
        if getattr(teacher, "known_text_only", False):
            problems.append(
                f"{key}: {teacher.name} knows given text only, and {name} trains on new text: use the model"
            )
    local = isinstance(recipe.teacher, LocalTeacherSection | SandboxTeacherSection)
    local &= not isinstance(method, AlignedMethod)
    if section.sampling.teacher_share and not (local and section.engine.name == "generate"):
        problems.append(
            "rollouts.sampling.teacher_share: it takes the engine `generate` and a local teacher with the student's "
            "tokenizer"
        )
    if section.informed and getattr(recipe.data, "context", None) is None:
        problems.append("rollouts.informed: prompts hold a context only with data.context: add e.g. context: {}")
    if method is not None and "informed" in method.needs and not section.informed:
        problems.append(f"rollouts.informed: {name} learns from a student that is told more: set it to true")
    if isinstance(method, GDSD | GRPO | RewardMethod):
        problems.extend(_compared(section.sampling))
    problems.extend(_environment(recipe, method))
    if problems:
        raise ValueError("\n".join(problems))
    drawn, age = section.sampling, f"text is at most {section.staleness} steps old"
    count, most = drawn.samples_per_prompt, drawn.max_new_tokens
    how = f"{count} a prompt, at most {most} tokens, temperature {drawn.temperature:g}"
    yield f"rollouts: {section.engine.name}, {how}; {age}"
    if section.environment is not None:
        yield f"rollouts.environment: {section.environment.name}, at most {section.environment.turns} turns"


def _compared(drawn: Sampling) -> Iterator[str]:
    """Say what leaves a reward without others of the same prompt to be compared with: nothing would be learned."""
    if drawn.samples_per_prompt < 2:
        yield "rollouts.sampling.samples_per_prompt: rewards are compared within a prompt's completions: set 2 or more"
    if drawn.temperature == 0:
        yield "rollouts.sampling.temperature: at 0 the completions of a prompt are all the same: set it above 0"


def _environment(recipe: Recipe, method: Method | None) -> Iterator[str]:
    """Say what keeps the environment of the rollouts from working."""
    environment: Any = recipe.rollouts and recipe.rollouts.environment
    if environment is None:
        return
    if isinstance(method, AlignedMethod):
        yield "rollouts.environment: a teacher with another tokenizer reads one turn only: use one with the student's"
    if environment.judged and recipe.verifier is None:
        yield f"rollouts.environment: {environment.name} asks the recipe's verifier: add a section `verifier`"
    column = environment.reference()
    if column is not None and recipe.verifier is not None and recipe.verifier.column not in (None, column):
        yield (
            f"rollouts.environment: it reads the column {column!r} and the verifier {recipe.verifier.column!r}, and "
            "rows carry one: let verifier.column be the same or null"
        )
    if isinstance(environment, Custom):
        try:
            environment.load()
        except ValueError as error:
            yield f"rollouts.environment.target: {error}"
