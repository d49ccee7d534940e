"""What a recipe says, as settings of TRL's GRPOTrainer; what means nothing there is refused by its key."""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np

from kdlm.data import DataSection
from kdlm.evaluation.start import start_of
from kdlm.looking import taken_by_trl
from kdlm.methods import GRPO, Method, RLADSection
from kdlm.recipe import Recipe
from kdlm.rollouts import RolloutSection
from kdlm.rollouts.rows import prompt_of
from kdlm.teachers import ByDomain, EnsembleSection, Learned
from kdlm.verifiers import Judge

MISSING = "method: trl cannot be imported ({}): pip install 'kdlm[rewards]'"


def in_trl(recipe: Recipe) -> bool:
    """Whether the method runs in TRL's trainer."""
    return issubclass(getattr(recipe.method, "method", object), GRPO)


def arguments(recipe: Recipe, **owned: Any) -> Any:
    """Return the `trl.GRPOConfig` of a recipe, with what kdlm decides in `owned`.

    A micro-batch holds all completions of `per_device_train_batch_size` prompts, as in any run with rollouts. Raises
    ValueError where TRL is not installed or does not take the settings.
    """
    try:
        from trl import GRPOConfig
    except ImportError as error:
        raise ValueError(MISSING.format(error)) from error
    assert recipe.rollouts is not None
    rollouts, drawn = recipe.rollouts, recipe.rollouts.sampling
    given: Any = recipe.training
    method: Any = recipe.method
    own = {
        "per_device_train_batch_size": given.per_device_train_batch_size * drawn.samples_per_prompt,
        "num_generations": drawn.samples_per_prompt,
        "num_generations_eval": 1,
        "max_completion_length": drawn.max_new_tokens,
        "temperature": drawn.temperature,
        "top_p": drawn.top_p,
        "top_k": drawn.top_k,
        "steps_per_generation": given.gradient_accumulation_steps * rollouts.every,
        "num_iterations": rollouts.reuse,
        "mask_truncated_completions": rollouts.truncated == "mask",
        "epsilon": method.clip,
        "epsilon_high": method.clip_high,
        "loss_type": method.loss_type,
        "scale_rewards": method.scale,
        "use_bias_correction_kl": not isinstance(method, RLADSection),
        "remove_unused_columns": False,
    }
    return given.build(GRPOConfig, **own, **engine(rollouts), **owned)


def engine(rollouts: RolloutSection) -> dict[str, Any]:
    """Return TRL's settings of what draws completions."""
    section: Any = rollouts.engine
    match section.name:
        case "vllm":
            return {
                "use_vllm": True,
                "vllm_mode": "colocate",
                "vllm_gpu_memory_utilization": section.gpu_memory_utilization,
                "vllm_max_model_length": section.max_model_len,
                "vllm_enable_sleep_mode": section.sleep,
            }
        case "vllm_server":
            return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": section.url}
    return {}


def trainer_of(
    model: Any,
    teacher: Any,
    args: Any,
    *,
    method: GRPO,
    rollouts: RolloutSection,
    reward: Judge,
    train_dataset: Any,
    eval_dataset: Any,
    data_collator: Any,
    **options: Any,
) -> Any:
    """Return the TeacherGRPOTrainer of a recipe: `args` are its `arguments`, datasets rows of `kdlm.data`.

    The data's collator is left out: TRL lays out prompts and completions itself.
    """
    from kdlm.reward_trainer import TeacherGRPOTrainer  # TRL takes seconds to import, and need not be there

    if eval_dataset is not None and rollouts.eval_prompts:
        eval_dataset = eval_dataset.select(range(min(rollouts.eval_prompts, len(eval_dataset))))
    return TeacherGRPOTrainer(
        model,
        reward,
        args,
        teacher=teacher,
        ratio=method.ratio,
        bound=method.bound,
        kl=method.teacher_kl or method.start_kl,
        reference=start_of(model, args.device) if method.start_kl else None,
        vocab=method.vocab,
        train_dataset=prompts(train_dataset, rollouts.prompt_tokens),
        eval_dataset=None if eval_dataset is None else prompts(eval_dataset, rollouts.prompt_tokens),
        **options,
    )


def prompts(rows: Any, leading: int | None) -> datasets.Dataset:
    """Return tokenised rows as TRL's: `prompt`, the ids before the last answer, and `reference` where they have it.

    Raises ValueError for plain text where `leading`, how many of its tokens are given, is not said.
    """
    columns: dict[str, Any] = {"prompt": [np.array(prompt_of(row, leading), dtype=np.int32) for row in rows]}
    if "reference" in rows.column_names:
        columns["reference"] = rows.with_format(None)["reference"]
    return datasets.Dataset.from_dict(columns)


KNOWN = {
    "generate": {"name"},
    "vllm": {"name", "gpu_memory_utilization", "max_model_len", "sleep"},
    "vllm_server": {"name", "url"},
}
"""Engine -> its keys that mean something to TRL."""


def looked_at(recipe: Recipe, method: Method | None) -> Iterator[str]:
    """Look at a run in TRL's trainer. Raises ValueError with all that it cannot do, each by its key."""
    if not isinstance(method, GRPO) or recipe.rollouts is None:  # the latter is said already
        return
    if problems := [*_rollouts(recipe.rollouts), *_sections(recipe), *_teacher(recipe)]:
        raise ValueError("\n".join(problems))
    yield taken_by_trl(lambda: arguments(recipe, output_dir=str(recipe.run_dir), seed=recipe.seed), "GRPOTrainer")


def _rollouts(rollouts: RolloutSection) -> Iterator[str]:
    drawn, section = rollouts.sampling, rollouts.engine
    if drawn.teacher_share:
        yield "rollouts.sampling.teacher_share: TRL draws from the student alone: leave it out"
    if rollouts.asynchronous:
        yield "rollouts.asynchronous: TRL draws and trains by turns: leave it out"
    if rollouts.informed:
        yield "rollouts.informed: completions are trained on after the prompt that was read: remove it"
    if rollouts.environment is not None:
        yield "rollouts.environment: a completion is one turn here: remove it"
    if "show" in rollouts.model_fields_set and rollouts.show:
        yield "rollouts.show: no samples are looked at in TRL's trainer: leave it out"
    for key in sorted(section.model_fields_set - KNOWN.get(section.name, section.model_fields_set)):
        yield f"rollouts.engine.{key}: means nothing to TRL, which has an engine of its own: leave it out"


def _sections(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if not isinstance(data, DataSection):
        yield f"data: {recipe.method.name} takes text, not {data.name}"
        return
    if recipe.verifier is None:
        yield f"verifier: missing; {recipe.method.name} learns from its score: add a section, e.g. {{name: answer}}"
    if data.streaming:
        yield "data.streaming: prompts are shuffled and repeated here: set false"
    if data.packing != "none":
        yield "data.packing: TRL pads prompts and completions: use none"
    if data.context is not None:
        yield "data.context: the teacher reads what the student reads here: remove it"
    if recipe.evaluation is not None:
        yield (
            "evaluation: in TRL's trainer it is the reward of completions: remove the section; rollouts.eval_prompts "
            "says of how many"
        )
    if recipe.sparsity is not None:
        yield "sparsity: TRL's trainer applies no masks: remove the section"
    if recipe.guards is not None:
        yield "guards: nothing is watched in TRL's trainer: remove the section; entropy, length and KL are in the log"


def _teacher(recipe: Recipe) -> Iterator[str]:
    teacher = recipe.teacher
    if teacher is not None and teacher.name == "self":
        yield "teacher: self keeps copies of the student, which TRL's trainer does not have: name a model"
    if isinstance(teacher, EnsembleSection) and isinstance(teacher.weights, Learned | ByDomain):
        yield f"teacher.weights: {teacher.weights.name} looks at rows of the data, which TRL does not hand on"
    signals = getattr(teacher, "signals", GRPO.signals)
    if teacher is not None and not GRPO.signals & signals:
        accepted, offered = (", ".join(sorted(s.__name__ for s in kinds)) for kinds in (GRPO.signals, signals))
        yield f"method: {recipe.method.name} takes a signal of {accepted}; this teacher gives {offered}"
