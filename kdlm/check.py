"""`kdlm check`: what can be known of a recipe before any weights are loaded."""

from collections.abc import Iterable, Iterator
from typing import Any

from transformers.integrations import get_available_reporting_integrations

from kdlm import preference_settings, reward_settings, rollout_checks, teacher_checks
from kdlm.data import DataSection, ImagesSection, ImageTextSection, TextClassesSection
from kdlm.data.forms import recognise
from kdlm.data.sources import open_source
from kdlm.evaluation.looks import looked_at
from kdlm.features import module_at
from kdlm.guards import looks as guards
from kdlm.looking import looks_like_hub_id, opened
from kdlm.matching import TAKES
from kdlm.methods import Method
from kdlm.models import (
    ImageClassifierSource,
    Loading,
    TextClassifierStudent,
    VisionLanguageStudent,
    replaced_layers,
)
from kdlm.privacy import looks as privacy
from kdlm.recipe import Recipe, reference_column
from kdlm.samplers import looks as samplers
from kdlm.section import Custom
from kdlm.sparsity import looks as sparsity
from kdlm.teachers import teachers_of


def check(recipe: Recipe) -> list[str]:
    """Validate a recipe and return a line for each thing that was looked at.

    Hub ids that cannot be opened here (no network) are reported as not looked at; they are no error, `kdlm train`
    will say. Raises ValueError with all problems, one a line, each beginning with its key.
    """
    lines: list[str] = []
    problems: list[str] = []
    method = None
    try:
        method = recipe.method.build(recipe.losses, None)
    except ValueError as error:
        problems.extend(_keyed("method", error))
    looks = (
        ("training", _training(recipe)),
        ("losses", _targets(recipe)),
        ("student", teacher_checks.masking(recipe, method)),
        ("method", _needs(recipe, method)),
        *_looks(recipe, method),
        ("sampler", samplers.looked_at(recipe, method)),
        ("evaluation", looked_at(recipe, method)),
        ("privacy", privacy.looked_at(recipe, method)),
        ("guards", guards.looked_at(recipe, method)),
        ("sparsity", sparsity.looked_at(recipe, method)),
    )
    for key, look in looks:
        try:
            lines.extend(look)
        except ValueError as error:
            problems.extend(_keyed(key, error))
    if problems:
        raise ValueError("\n".join(problems))
    return lines


def _looks(recipe: Recipe, method: Method | None) -> tuple[tuple[str, Iterable[str]], ...]:
    """Return what is looked at of this form of data."""
    if isinstance(recipe.data, DataSection):
        return _text(recipe, method)
    if isinstance(recipe.data, TextClassesSection):
        return _text_classes(recipe, method)
    return _image_text(recipe, method) if isinstance(recipe.data, ImageTextSection) else _samples(recipe, method)


def _text(recipe: Recipe, method: Method | None) -> tuple[tuple[str, Iterable[str]], ...]:
    """Return what is looked at where a language model learns from text."""
    return (
        ("student", _student(recipe, method)),
        ("rollouts", rollout_checks.rollouts(recipe, method)),
        ("method", reward_settings.looked_at(recipe, method)),
        ("method", preference_settings.looked_at(recipe, method)),
        ("losses", teacher_checks.signals(recipe, method)),
        ("teacher", teacher_checks.server(recipe)),
        ("teacher", teacher_checks.tokenizers(recipe, method)),
        ("data", teacher_checks.second_reading(recipe, method)),
        ("teacher", teacher_checks.captured(recipe)),
        ("teacher", teacher_checks.ensemble(recipe)),
        ("teacher", teacher_checks.capacity(recipe, method)),
        ("data", _data(recipe, method)),
    )


def _image_text(recipe: Recipe, method: Method | None) -> tuple[tuple[str, Iterable[str]], ...]:
    """Return what is looked at where a vision-language model learns from conversations about images."""
    if not isinstance(recipe.student, VisionLanguageStudent):
        raise ValueError(f"student: {recipe.student.name} reads no images with text: use name: vision_language")
    if recipe.rollouts is not None:
        raise ValueError("rollouts: the student's own text cannot be made of image_text data: remove the section")
    return (
        ("student", _student(recipe, method)),
        ("losses", teacher_checks.signals(recipe, method)),
        ("teacher", teacher_checks.tokenizers(recipe, method)),
        ("data", recipe.data.look()),
    )


def _text_classes(recipe: Recipe, method: Method | None) -> tuple[tuple[str, Iterable[str]], ...]:
    """Return what is looked at where a classifier learns from texts."""
    if not isinstance(recipe.student, TextClassifierStudent):
        raise ValueError(f"student: {recipe.student.name} tells no classes of texts apart: use name: text_classifier")
    if recipe.rollouts is not None:
        raise ValueError("rollouts: the student's own text cannot be made of text_classes data: remove the section")
    return (
        ("student", _student(recipe, method)),
        ("teacher", teacher_checks.tokenizers(recipe, method)),
        ("data", recipe.data.look()),
    )


def _samples(recipe: Recipe, method: Method | None) -> tuple[tuple[str, Iterable[str]], ...]:
    """Return what is looked at where the data are images or other samples."""
    if recipe.rollouts is not None:
        raise ValueError(
            f"rollouts: the student's own text cannot be made of {recipe.data.name} data: remove the section"
        )
    return (
        ("student", _networks(recipe)),
        ("method", _features(recipe, method)),
        ("data", _looked_at(recipe)),
    )


def _features(recipe: Recipe, method: Method | None) -> Iterator[str]:
    """Look for the modules that a method names in image classifiers whose configuration can be read here."""
    problems = []
    for key, model in (("student", recipe.student), *teachers_of(recipe.teacher)):
        paths = getattr(method, f"{key}_features", ())
        if not paths or not isinstance(model, ImageClassifierSource) or not model.on_this_machine:
            continue
        bare = model.skeleton()
        for path in paths:
            try:
                module_at(bare, path)
            except ValueError as error:
                problems.append(f"method: {key}: {error}")
        yield f"method: features of the {key}: {', '.join(paths)}"
    if problems:
        raise ValueError("\n".join(problems))


def _networks(recipe: Recipe) -> Iterator[str]:
    """Look at student and teacher without their weights: what a denoiser is, how many classes a classifier knows."""
    names = recipe.data.classes() if isinstance(recipe.data, ImagesSection) else None
    problems = []
    for key, model in (("student", recipe.student), *teachers_of(recipe.teacher)):
        model = getattr(model, "of", model)
        said = f"{key}: {model.describe() if hasattr(model, 'describe') else model.name}"
        try:
            kind, why = opened(model.look, model) if hasattr(model, "look") else ("", "")
            if isinstance(model, ImageClassifierSource):
                why = "" if model.on_this_machine else "not on this machine yet"
                known = model.configuration().num_labels if model.on_this_machine else None
                if known is not None and names is not None and known != len(names):
                    problems.append(f"{key}: it tells {known} classes apart, and the data have {len(names)}")
        except ValueError as error:
            problems.append(f"{key}: {error}")
            continue
        yield f"{said} not looked at here ({why})" if why else f"{said} ({kind})" if kind else said
    if problems:
        raise ValueError("\n".join(problems))


def _looked_at(recipe: Recipe) -> Iterator[str]:
    yield from recipe.data.look()


def _keyed(key: str, error: ValueError) -> list[str]:
    """Name the recipe's key in front of a message that does not name one itself."""
    return [
        line if line.split(":")[0].split(".")[0] in Recipe.model_fields else f"{key}: {line}"
        for line in str(error).splitlines()
        if line
    ]


def _training(recipe: Recipe) -> Iterator[str]:
    args = recipe.training.build(output_dir=str(recipe.run_dir), seed=recipe.seed)
    if getattr(recipe.data, "streaming", False) and args.max_steps <= 0:
        raise ValueError("training.max_steps: streamed data has no length, so the number of steps must be given")
    asked = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or [])
    if missing := sorted(set(asked) - {"none", "all"} - set(get_available_reporting_integrations())):
        raise ValueError(f"training.report_to: {missing[0]} is not installed: pip install {missing[0]}")
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = "sequences" if isinstance(recipe.data, DataSection | ImageTextSection | TextClassesSection) else "samples"
    yield f"training: {length}, {batch} {rows} a step and device, learning rate {args.learning_rate:g}"


def _student(recipe: Recipe, method: Method | None) -> Iterator[str]:
    student: Any = recipe.student  # of text, with images or without
    lora, few_bits = getattr(student, "lora", None), getattr(student, "quantization_aware", None)
    if lora is not None and method is not None:
        lora.check_export(averaged=method.exported != "student")
    if few_bits is not None and (lora is not None or _quantised(student)):
        raise ValueError("student.quantization_aware: it trains all weights in full; leave lora and quantization out")
    if lora is None and _quantised(student):
        raise ValueError("student.quantization: quantised weights do not train; add student.lora, or load them whole")
    how = ", LoRA" if lora is not None else "" if few_bits is None else f", aware of {few_bits.bits} bits"
    yield f"student: {student.describe()}{how}"
    config, why_not = opened(student.config, student)
    if config is None:
        yield f"student: not looked at here ({why_not})"
    if getattr(student, "router_balance", None) is not None:
        if recipe.privacy is not None or reward_settings.in_trl(recipe) or preference_settings.by_preferences(recipe):
            raise ValueError("student.router_balance: not with privacy, nor with a method that TRL's trainers run")
        if config is not None and not getattr(config.get_text_config(), "num_experts_per_tok", None):
            raise ValueError("student.router_balance: the student is no mixture of experts: remove it")
    for key, model in (("student", student), *teachers_of(recipe.teacher)):
        yield from _needs_of_loading(key, model)
        try:
            config = opened(model.config, model)[0] if hasattr(model, "config") else None
        except ValueError:  # that it cannot be opened is said where a teacher is looked at
            continue
        refuse_packing(recipe, key, config)
    if few_bits is not None:
        few_bits.configs()


def refuse_packing(recipe: Recipe, key: str, config: Any) -> None:
    """Raise ValueError where sequences are laid end to end, and a model has layers whose state would run on."""
    packing = getattr(recipe.data, "packing", "none")
    if packing != "none" and hasattr(config, "get_text_config") and replaced_layers(config):
        raise ValueError(
            f"data.packing: {packing} lays sequences end to end, and the {key} has layers whose state does not end "
            "with a sequence: set packing: none"
        )


def _targets(recipe: Recipe) -> Iterator[str]:
    """Import what custom losses and a custom teacher name; building the method does it for a custom one."""
    problems = []
    for key, section in [
        *teachers_of(recipe.teacher),
        *((f"losses.{i}", loss) for i, loss in enumerate(recipe.losses)),
        *([] if recipe.verifier is None else [("verifier", recipe.verifier)]),
    ]:
        if isinstance(section, Custom):
            try:
                section.load()
                yield f"{key}: custom, {section.target}"
            except ValueError as error:
                problems.append(f"{key}.target: {error}")
    if problems:
        raise ValueError("\n".join(problems))


def _needs(recipe: Recipe, method: Method | None) -> Iterator[str]:
    if method is None:  # building it failed, which is said already
        return
    if "context" in method.needs and getattr(recipe.data, "context", None) is None:
        raise ValueError(
            f"data.context: missing; {recipe.method.name} writes into the teacher's prompt what the student is not "
            "told: add e.g. context: {}, and columns: {context: COLUMN} to a source"
        )
    for key, teacher in teachers_of(recipe.teacher):
        if getattr(recipe.data, "context", None) is not None and getattr(teacher, "known_text_only", False):
            raise ValueError(f"data.context: {key} {teacher.name} knows texts as they were captured: use the model")
    environment: Any = recipe.rollouts and recipe.rollouts.environment
    rewarded = recipe.verifier is not None or (environment is not None and not environment.judged)
    if "reward" in method.needs and not rewarded:
        raise ValueError(
            f"verifier: missing; {recipe.method.name} learns from rewards: add e.g. verifier: {{name: answer}}"
        )
    if "turns" in method.needs and (recipe.rollouts is None or recipe.rollouts.environment is None):
        raise ValueError(
            f"rollouts.environment: missing; {recipe.method.name} learns from several turns: add e.g. environment: "
            "{name: retry, until_right: false}"
        )
    # For rollouts see rollout_checks, for unmasking teacher_checks.masking, for preferences _data.
    of_rows = {"rollouts", "context", "informed", "preferences", "reward", "turns", "unmasking"}
    of_text = of_rows if isinstance(recipe.data, DataSection) else set()
    provides = {*of_text, *recipe.data.provides} | (
        set() if recipe.teacher is None else set(getattr(recipe.teacher, "provides", method.needs))
    )
    if missing := sorted(method.needs - provides):
        if lacking := [need for need in missing if need != "teacher" and "teacher." not in need]:
            raise ValueError(
                f"data: {recipe.data.name} does not provide {', '.join(lacking)}, which {recipe.method.name} needs"
            )
        if recipe.teacher is None:
            raise ValueError(f"teacher: missing; {recipe.method.name} with these losses needs {', '.join(missing)}")
        raise ValueError(
            f"teacher: {recipe.teacher.name} does not provide {', '.join(missing)}, which {recipe.method.name} needs"
        )
    for split in ("train", "eval"):
        for index, source in enumerate(getattr(recipe.data, split, None) or []):
            if "weight" in getattr(source, "columns", {}) and not method.weighs:
                raise ValueError(
                    f"data.{split}.{index}.columns.weight: {recipe.method.name} counts all rows alike: leave it out, "
                    "or use a method that counts by weights (docs/row_weights.md)"
                )
    yield f"method: {recipe.method.name}; needs {', '.join(sorted(method.needs))}"


def _data(recipe: Recipe, method: Method | None) -> Iterator[str]:
    problems = []
    data = recipe.data.with_reference(reference_column(recipe))
    preferred = method is not None and "preferences" in method.needs
    answers = recipe.rollouts is None or (method is not None and "labels" in method.needs)
    for split in ("train", "eval"):
        for index, source in enumerate(getattr(data, split) or []):
            if source.path.startswith("sandbox:"):
                yield f"data: {split}: {source.path}"
                continue
            try:
                opened = open_source(source, stream=True)
                form = recognise(source, opened.columns).name
                if form == "prompt" and answers:
                    problems.append(
                        f"data.{split}.{index}: {source.path} has prompts alone, and {recipe.method.name} needs answers"
                    )
                if method is not None and (form == "preference") != preferred:
                    problems.append(f"data.{split}.{index}: {source.path}: {recipe.method.name}: {TAKES[preferred]}")
                if form == "text" and recipe.rollouts is not None and recipe.rollouts.prompt_tokens is None:
                    problems.append(f"rollouts.prompt_tokens: {source.path} has no prompts: say how many tokens lead")
                yield f"data: {split}: {source.path} ({form})"
            except ValueError as error:
                if looks_like_hub_id(source.path):
                    yield f"data: {split}: {source.path} not looked at here ({error})"
                else:
                    problems.append(f"data.{split}.{index}: {error}")
    if problems:
        raise ValueError("\n".join(problems))


def _needs_of_loading(key: str, model: Any) -> Iterator[str]:
    """Note what loading would miss on this machine: bitsandbytes, flash-attn. The run may be meant for another."""
    if isinstance(model, Loading):
        try:
            model.options()
        except ValueError as error:
            yield f"{key}: note: cannot be loaded on this machine: {error}"


def _quantised(student: Any) -> bool:
    return getattr(student, "quantization", "none") != "none"
