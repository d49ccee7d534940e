"""What a recipe says, as settings of TRL's trainers of preferences; what means nothing there is refused by its key."""

import copy
from collections.abc import Iterator
from typing import Any

from kdlm.data import DataSection
from kdlm.looking import taken_by_trl
from kdlm.matching import check_sides
from kdlm.methods import DPO, Method, PreferenceMethod
from kdlm.recipe import Recipe
from kdlm.teachers import LocalTeacher, LocalTeacherSection, SandboxTeacherSection

MISSING = "method: trl cannot be imported ({}): pip install 'kdlm[rewards]'"


def by_preferences(recipe: Recipe) -> bool:
    """Whether the method runs in one of TRL's trainers of preferences."""
    return issubclass(getattr(recipe.method, "method", object), PreferenceMethod)


def arguments(recipe: Recipe, **owned: Any) -> Any:
    """Return the `trl.DPOConfig` or `CPOConfig` of a recipe, with what kdlm decides in `owned`.

    Raises ValueError where TRL is not installed or does not take the settings.
    """
    method: Any = recipe.method
    try:
        if method.name == "dpo":
            from trl import DPOConfig

            terms = {"sigmoid": 1.0} | ({"sft": method.chosen_ce} if method.chosen_ce else {})
            kind, own = DPOConfig, {"loss_type": list(terms), "loss_weights": list(terms.values())}
        else:
            from kdlm.preference_trainer import CPOConfig

            kind = CPOConfig
            own = {"loss_type": "simpo", "simpo_gamma": method.gamma, "cpo_alpha": method.chosen_ce}
    except ImportError as error:
        raise ValueError(MISSING.format(error)) from error
    # Rows are cut to size when they are tokenised.
    return recipe.training.build(
        kind, beta=method.beta, max_length=recipe.data.max_length, remove_unused_columns=False, **own, **owned
    )


def trainer_of(
    model: Any, teacher: Any, args: Any, *, method: PreferenceMethod, data_collator: Any, **options: Any
) -> Any:
    """Return TRL's trainer of a recipe: `args` are its `arguments`, datasets rows of `kdlm.data`.

    The data's collator is left out: TRL has batches of its own. Raises ValueError for rows that are no preferences.
    """
    from kdlm.preference_trainer import PreferenceCPOTrainer, PreferenceDPOTrainer  # seconds, and not always there

    check_sides(method, options["train_dataset"], options["eval_dataset"])
    if not isinstance(method, DPO):
        return PreferenceCPOTrainer(model, args, **options)
    reference = None
    if method.reference == "teacher":
        assert isinstance(teacher, LocalTeacher)  # `check` has seen to it
        reference = teacher.model
    elif not hasattr(model, "peft_config"):  # TRL would look for it by its name, on a hub
        reference = copy.deepcopy(model).eval().requires_grad_(False)
    return PreferenceDPOTrainer(model, reference, args, **options)


def looked_at(recipe: Recipe, method: Method | None) -> Iterator[str]:
    """Look at a run in TRL's trainers. Raises ValueError with all that it cannot do, each by its key."""
    if not isinstance(method, PreferenceMethod):
        return
    if problems := list(_problems(recipe, method)):
        raise ValueError("\n".join(problems))
    trainer = "DPOTrainer" if isinstance(method, DPO) else "CPOTrainer"
    yield taken_by_trl(lambda: arguments(recipe, output_dir=str(recipe.run_dir), seed=recipe.seed), trainer)


def _problems(recipe: Recipe, method: PreferenceMethod) -> Iterator[str]:
    data, name = recipe.data, recipe.method.name
    if not isinstance(data, DataSection):
        yield f"data: {name} takes text, not {data.name}"
        return
    if data.streaming:
        yield "data.streaming: TRL is given stored rows here: set false"
    if data.packing != "none":
        yield "data.packing: TRL pads prompts and completions: use none"
    wants = isinstance(method, DPO) and method.reference == "teacher"
    if wants and getattr(recipe.teacher, "placement", "resident") == "sliced":
        yield "teacher.placement: TRL holds the reference itself: use resident"
    if recipe.teacher is not None and not wants:
        yield f"teacher: {name} does not ask it: remove the section, or take dpo with reference: teacher"
    if (
        wants
        and recipe.teacher is not None
        and not isinstance(recipe.teacher, LocalTeacherSection | SandboxTeacherSection)
    ):
        yield f"teacher: TRL takes a model as the reference, not {recipe.teacher.name}: use local"
    for key, words in SECTIONS.items():
        if getattr(recipe, key) is not None:
            yield f"{key}: {words}: remove the section"


SECTIONS = {
    "evaluation": "in TRL's trainer it is the loss and the margins of held-out pairs",
    "guards": "nothing is watched in TRL's trainer; logps/chosen is in the log",
    "privacy": "TRL's trainer does not clip the gradients of rows",
    "sparsity": "TRL's trainer applies no masks",
    "sampler": "TRL draws pairs by itself",
}
"""Section of a recipe -> why it has no place here."""
