"""`kdlm train`: the only place that assembles a run."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import logging as hf_logging

from kdlm import checkpoints, preference_settings, reward_settings
from kdlm.check import check, refuse_packing
from kdlm.data import Data
from kdlm.diffusion_trainer import DiffusionTrainer
from kdlm.guards.course import history_of, refuse_stopped
from kdlm.methods.diffusion.method import DiffusionMethod
from kdlm.models import check_classes, merge, on_the_grid
from kdlm.networks import role_plan
from kdlm.on_policy import OnPolicyTrainer
from kdlm.opening import common_ids, loaded, opened_student, opened_whole, other_rows
from kdlm.parallelism import refuse_cuts, refuse_with_slices
from kdlm.preference_settings import by_preferences
from kdlm.privacy.trainer import PrivateOnPolicyTrainer, PrivateTrainer
from kdlm.progress import Display, MetricsFile, log_figures
from kdlm.recipe import Recipe
from kdlm.remote import ServerUnavailable
from kdlm.reward_settings import in_trl
from kdlm.role_checkpoints import HandOver
from kdlm.run_folder import RunFolder, model_card
from kdlm.samplers import tied
from kdlm.samples import SampleLog
from kdlm.sparsity.layers import ABOUT, described_sparsity
from kdlm.teachers import CachedTeacher
from kdlm.trainer import DistillTrainer
from kdlm.verifiers import Judge

Figures = Callable[[Path], Mapping[str, bytes]]
"""A run folder -> pictures by name, as PNG."""


@dataclass(frozen=True)
class Assembly:
    """A run, ready to go."""

    trainer: DistillTrainer
    data: Data
    tokenizer: Any


def train(
    recipe: Recipe,
    *,
    resume: bool | str = False,
    figures: Figures | None = None,
    placement: Mapping[str, Any] | None = None,
    stage: HandOver | None = None,
) -> Path:
    """Run a recipe to its end and return the run folder.

    Args:
        recipe: what to run.
        resume: True goes on from the newest finished checkpoint of `run_dir` (or starts, if there is none); a path
            names a checkpoint.
        figures: draws a finished run folder, name -> PNG, for the trackers that the run reports to.
        placement: why the teacher is where it is (`kdlm.plan.settled`), for environment.json.
        stage: what goes on from stage to stage, where the run is one of several in this process, whose process group
            then stays open.

    A run that a guard ends (`recipe.guards`) leaves a checkpoint, `stopped` in results.json, and no student.

    Raises ValueError, before anything is written, when the recipe cannot work; ServerUnavailable when a server that
    it asks stays away, after a checkpoint of the last finished step.
    """
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    folder = RunFolder(recipe.run_dir)
    checkpoint = folder.starting_point(recipe, resume)
    if checkpoint is not None and recipe.guards is not None:
        refuse_stopped(recipe.guards, history_of(checkpoint), str(recipe.run_dir))
    notes = [line for line in check(recipe) if ": note: " in line]
    run = assemble(recipe)
    trainer = run.trainer
    if stage is not None and checkpoint is None:
        stage.take(trainer.networks)
    writes = trainer.is_world_process_zero()
    trainer.accelerator.wait_for_everyone()  # until all have seen what the folder holds
    if writes:
        if stage is not None:
            stage.begins()
        print("\n".join(notes), end="\n" if notes else "")
        step = checkpoints.step_of(checkpoint) if checkpoint else 0
        print(run.data.report)
        folder.open(recipe, described(run.data), step, placement)
        trainer.add_callback(MetricsFile(folder.metrics))
        trainer.sample_log = SampleLog(folder.path)
        if isinstance(trainer, DiffusionTrainer):
            trainer.pictures = folder.path / "samples"
        if resume:
            print(f"resuming at step {step}" if checkpoint else "no finished checkpoint yet: starting at step 0")
    trainer.args.eval_on_start &= checkpoint is None  # a resumed run has that evaluation behind it
    try:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        results = {"steps": outcome.global_step, **outcome.metrics} | ended(trainer, run.data.eval is not None)
        if isinstance(trainer, PrivateTrainer):
            results["privacy"] = trainer.spent()
    except ServerUnavailable as error:
        raise ServerUnavailable(f"{error}\n{save_what_is_done(trainer)}") from error
    finally:
        trainer.close()
    weights = trainer.exported_weights()
    if writes:
        folder.write_results(results)
        if trainer.guards is not None and trainer.guards.stopped is not None:
            print(f"stopped by {trainer.guards.stopped}: no student is handed out; it is in {folder.newest}")
        else:
            hand_out(recipe, run, folder, results, weights)
        if figures is not None:
            log_figures(trainer, partial(figures, folder.path))
    if stage is not None:
        stage.leave(trainer.networks, folder.path, writes=writes)
    trainer.accelerator.wait_for_everyone()
    if stage is None:
        trainer.accelerator.end_training()  # a rank that exits with its process group open may abort
    return folder.path


def ended(trainer: DistillTrainer, evaluates: bool) -> dict[str, Any]:
    """Return what results.json says of how a run ended: the student's evaluation, or the guard that stopped it."""
    if trainer.guards is not None and trainer.guards.stopped is not None:
        return {"stopped": asdict(trainer.guards.stopped)}
    return (final_metrics(trainer) if evaluates else {}) | best_of(trainer)


def hand_out(
    recipe: Recipe, run: Assembly, folder: RunFolder, results: dict[str, Any], weights: dict[str, Any] | None = None
) -> None:
    """Write the student, and say where it is; `weights` are those of a student in shards, whole."""
    if "best" in results and results["best"]["step"] is None:
        print(f"note: no checkpoint has a finite {results['best']['metric']}: the student is that of the last step")
    export(recipe, run, folder, results, weights)
    print(f"student: {folder.student}")


def save_what_is_done(trainer: DistillTrainer) -> str:
    """Save a checkpoint of the last finished optimiser step, if there is none yet, and say how to go on."""
    step = trainer.state.global_step
    folder = Path(str(trainer.args.output_dir)) / f"checkpoint-{step}"
    if trainer.accelerator.num_processes > 1:  # the other ranks are inside the step and could not join in saving
        return "when the server is back, --resume goes on from the newest checkpoint"
    if step == 0:
        return "no step was finished; when the server is back, begin again with --resume"
    if not (folder / checkpoints.MANIFEST).is_file():
        trainer._save_checkpoint(trainer.student, None)
    return f"stopped after step {step}, saved as {folder}; when the server is back, --resume goes on from there"


def final_metrics(trainer: DistillTrainer) -> dict[str, float]:
    """Return the evaluation of the student that is handed out: that of the step it is of, if there was one."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    step = trainer.state.global_step if best is None else checkpoints.step_of(Path(best))
    logs = [logs for logs in trainer.state.log_history if logs["step"] == step]
    return {key: value for one in logs for key, value in one.items() if key.startswith("eval_")} or trainer.evaluate()


def best_of(trainer: DistillTrainer) -> dict[str, Any]:
    """Return which checkpoint was the best and by what, where the best one is handed out; None where none was."""
    state, metric = trainer.state, trainer.args.metric_for_best_model
    if not trainer.args.load_best_model_at_end:
        return {}
    if state.best_model_checkpoint is None:
        return {"best": {"step": None, "metric": metric, "value": None}}
    step = checkpoints.step_of(Path(state.best_model_checkpoint))
    return {"best": {"step": step, "metric": metric, "value": state.best_metric}}


def assemble(recipe: Recipe) -> Assembly:
    """Load everything a recipe names and put it together; nothing is written to the run folder."""
    args = training_arguments(recipe)
    args.run_name = args.run_name or "-".join(part for part in recipe.run_dir.parts if part != "/")  # in trackers
    args.dataloader_pin_memory &= args.device.type == "cuda"
    # A padding-free batch has one row, which ranks cannot share: each reads its own.
    args.accelerator_config = AcceleratorConfig(dispatch_batches=False)
    set_seed(recipe.seed)
    tokenizer, data = loaded(recipe)
    student, lora = opened_student(recipe, data), getattr(recipe.student, "lora", None)
    teacher = None if recipe.teacher is None else recipe.teacher.build(args.device)
    for key, model in (("student", student), ("teacher", getattr(teacher, "model", None))):
        refuse_packing(recipe, key, getattr(model, "config", None))  # `check` has not seen what was not there yet
    if isinstance(teacher, CachedTeacher):
        teacher.made_with = data.made_with
    method = recipe.method.build(tied(recipe.losses, recipe.sampler), common_ids(recipe, tokenizer, student, teacher))
    if lora is not None:
        lora.check_export(averaged=method.exported != "student")
    refuse_cuts(args, student)
    if in_trl(recipe) or by_preferences(recipe):
        refuse_with_slices(student, f"method: {recipe.method.name}")
    judge = None if recipe.verifier is None else Judge(recipe.verifier)
    private = {} if recipe.privacy is None else {"privacy": recipe.privacy}
    kind: Any = PrivateTrainer if private else DistillTrainer
    if isinstance(method, DiffusionMethod):
        kind = partial(DiffusionTrainer, sampling=recipe.sampling)
    if recipe.rollouts is not None:
        variables = getattr(recipe.data, "chat_template_args", None)
        kind = PrivateOnPolicyTrainer if private else OnPolicyTrainer
        kind = partial(kind, rollouts=recipe.rollouts, reward=judge, chat_template_args=variables)
    if in_trl(recipe):  # `check` has seen to rollouts and a verifier
        assert recipe.rollouts is not None and judge is not None
        kind = partial(reward_settings.trainer_of, rollouts=recipe.rollouts, reward=judge)
    if by_preferences(recipe):
        kind = preference_settings.trainer_of
    trainer = kind(
        student,
        teacher,
        args,
        method=method,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        data_collator=data.collator,
        callbacks=[Display(plan=partial(role_plan, method) if len(method.roles) > 1 else None)],
        **private,
    )
    if getattr(trainer, "is_fsdp_enabled", False) and not isinstance(trainer, DistillTrainer):
        raise ValueError(f"training.fsdp: {type(trainer).__name__} is TRL's, and was never run in shards: leave it out")
    if getattr(trainer, "is_deepspeed_enabled", False) and not isinstance(trainer, DistillTrainer):
        raise ValueError(f"DeepSpeed: {type(trainer).__name__} is TRL's, and was never run under it: leave it out")
    if recipe.sampler is not None:
        trainer.draw(
            recipe.sampler, documents=data.documents.get("train"), names=getattr(recipe.data, "domain_names", None)
        )
    if recipe.evaluation is not None:
        trainer.watch(recipe.evaluation, other=other_rows(recipe, tokenizer), judge=judge)
    if recipe.guards is not None:
        trainer.guard(recipe.guards)
    if recipe.sparsity is not None:
        trainer.sparsify(recipe.sparsity)
    if (balance := getattr(recipe.student, "router_balance", None)) is not None:
        trainer.balance_routers(balance)
    if "classes" in data.made_with:
        name_classes(trainer, data.made_with["classes"])
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return Assembly(trainer, data, tokenizer)


def training_arguments(recipe: Recipe) -> Any:
    """Return the arguments of the trainer that runs the method."""
    owned = {"output_dir": str(recipe.run_dir), "seed": recipe.seed, "disable_tqdm": True}
    if by_preferences(recipe):
        return preference_settings.arguments(recipe, **owned)
    return reward_settings.arguments(recipe, **owned) if in_trl(recipe) else recipe.training.build(**owned)


def name_classes(trainer: DistillTrainer, classes: list[str]) -> None:
    """Tell a student that is an image classifier what its classes are called. Raises ValueError if it has others."""
    check_classes(trainer.networks.views, classes)
    config = trainer.networks.config
    if getattr(config, "id2label", None):
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}


def described(data: Data) -> dict[str, Any]:
    """Return what data.json says: fingerprints of the splits, and what became of every source's rows."""
    return {"fingerprints": data.fingerprints, **data.report.as_dict()}


def export(
    recipe: Recipe, run: Assembly, folder: RunFolder, results: dict[str, Any], weights: dict[str, Any] | None = None
) -> None:
    """Write the student: merged into its base where it was trained by adapters, unless the adapter was asked for.

    An average of such a student is merged already. One of few bits is written with its weights on the grid. Of a
    student in shards `weights` are put into one that is opened anew, in the host's memory.
    """
    student, lora = run.trainer.exported, getattr(recipe.student, "lora", None)
    merged = student is run.trainer.student and lora is not None and lora.export == "merged"
    if weights is not None:
        student = opened_student(opened_whole(recipe), run.data)
        student.load_state_dict(weights)
        if "classes" in run.data.made_with:
            student.config = run.trainer.networks.config
    if merged:
        student = merge(student)
    if getattr(recipe.student, "quantization_aware", None) is not None:
        student = on_the_grid(student)
    sparse = {} if recipe.sparsity is None else described_sparsity(student, recipe.sparsity)
    beside = {ABOUT: json.dumps(sparse, indent=1)} if sparse else {}
    folder.export(student, run.tokenizer, model_card(recipe, str(run.data.report), results), beside)
