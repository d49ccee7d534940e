"""`kdlm check`: what can be known of a recipe before any weights are loaded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers.integrations import get_available_reporting_integrations

from kdlm.data.forms import recognise
from kdlm.data.sources import HUB_ID, open_source
from kdlm.data.tokenised import made_with
from kdlm.data.vocabulary import shared_vocabulary
from kdlm.methods import Method, Step, TokenMethod
from kdlm.models import Fresh, Loading, Pruned, Sandbox
from kdlm.recipe import Recipe
from kdlm.sandbox import is_built
from kdlm.section import Custom
from kdlm.signal import Sampled, TopK
from kdlm.store import read_about
from kdlm.teachers import ByDomain, CachedTeacherSection, Confidence, EnsembleSection, Learned
from kdlm.teachers.cached import differences_of


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
        ("student", _student(recipe)),
        ("losses", _targets(recipe)),
        ("method", _needs(recipe, method)),
        ("losses", _signals(recipe, method)),
        ("teacher", _server(recipe)),
        ("teacher", _tokenizers(recipe, method)),
        ("teacher", _captured(recipe)),
        ("teacher", _ensemble(recipe)),
        ("data", _data(recipe)),
    )
    for key, look in looks:
        try:
            lines.extend(look)
        except ValueError as error:
            problems.extend(_keyed(key, error))
    if problems:
        raise ValueError("\n".join(problems))
    return lines


def _keyed(key: str, error: ValueError) -> list[str]:
    """Name the recipe's key in front of a message that does not name one itself."""
    return [
        line if line.split(":")[0].split(".")[0] in Recipe.model_fields else f"{key}: {line}"
        for line in str(error).splitlines()
        if line
    ]


def teachers_of(recipe: Recipe) -> list[tuple[str, Any]]:
    """Return every teacher with its key in the recipe: an ensemble's members in its place."""
    teacher = recipe.teacher
    if isinstance(teacher, EnsembleSection):
        return [(f"teacher.members.{number}", member) for number, member in enumerate(teacher.members)]
    return [] if teacher is None else [("teacher", teacher)]


def _training(recipe: Recipe) -> Iterator[str]:
    args = recipe.training.build(output_dir=str(recipe.run_dir), seed=recipe.seed)
    if recipe.data.streaming and args.max_steps <= 0:
        raise ValueError("training.max_steps: streamed data has no length, so the number of steps must be given")
    asked = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or [])
    if missing := sorted(set(asked) - {"none", "all"} - set(get_available_reporting_integrations())):
        raise ValueError(f"training.report_to: {missing[0]} is not installed: pip install {missing[0]}")
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    yield f"training: {length}, {batch} sequences a step and device, learning rate {args.learning_rate:g}"


def _student(recipe: Recipe) -> Iterator[str]:
    student = recipe.student
    if student.lora is not None and student.lora.export == "merged" and _quantised(student):
        raise ValueError("student.lora.export: merging into quantised weights loses precision; set export: adapter")
    if student.lora is None and _quantised(student):
        raise ValueError("student.quantization: quantised weights do not train; add student.lora, or load them whole")
    yield f"student: {student.describe()}{', LoRA' if student.lora is not None else ''}"
    config, why_not = _opened(student.config, student)
    if config is None:
        yield f"student: not looked at here ({why_not})"
    for key, model in (("student", student), *teachers_of(recipe)):
        yield from _needs_of_loading(key, model)


def _targets(recipe: Recipe) -> Iterator[str]:
    """Import what custom losses and a custom teacher name; building the method does it for a custom one."""
    problems = []
    for key, section in [*teachers_of(recipe), *((f"losses.{i}", loss) for i, loss in enumerate(recipe.losses))]:
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
    provides = {"labels"} | (
        set() if recipe.teacher is None else set(getattr(recipe.teacher, "provides", method.needs))
    )
    if missing := sorted(method.needs - provides):
        if recipe.teacher is None:
            raise ValueError(f"teacher: missing; {recipe.method.name} with these losses needs {', '.join(missing)}")
        raise ValueError(
            f"teacher: {recipe.teacher.name} does not provide {', '.join(missing)}, which {recipe.method.name} needs"
        )
    yield f"method: {recipe.method.name}; needs {', '.join(sorted(method.needs))}"


def _signals(recipe: Recipe, method: Method | None) -> Iterator[str]:
    given = getattr(recipe.teacher, "signals", None)
    if not isinstance(method, TokenMethod) or given is None:
        return
    own = [("method", loss) for _, loss, _ in method.weighted(Step(0, 1)) if loss not in recipe.losses]
    for key, loss in [*((f"losses.{index}", loss) for index, loss in enumerate(recipe.losses)), *own]:
        if loss.needs_teacher and not loss.signals & given:
            accepted, offered = (", ".join(sorted(s.__name__ for s in kinds)) for kinds in (loss.signals, given))
            name = getattr(loss, "name", recipe.method.name)
            raise ValueError(f"{key}: {name} takes a signal of {accepted}; this teacher gives {offered}")
        if given <= {TopK, Sampled} and getattr(loss, "temperature", 1.0) != 1.0:
            raise ValueError(
                f"{key}.temperature: {loss.temperature:g}, but this teacher knows a few tokens at "
                "temperature 1 only; set 1, or capture `hidden`"
            )
    if recipe.losses:
        yield f"losses: {', '.join(loss.name for loss in recipe.losses)}"


def _server(recipe: Recipe) -> Iterator[str]:
    """Ask a teacher's server what it is. It may not be up yet, or be reached from another machine: that is no error."""
    teacher: Any = recipe.teacher
    if hasattr(teacher, "look"):
        try:
            yield f"teacher: {teacher.url} {teacher.look()}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"teacher: not looked at here ({error})"


def _tokenizers(recipe: Recipe, method: Method | None) -> Iterator[str]:
    problems = []
    for key, teacher in teachers_of(recipe):
        if isinstance(teacher, CachedTeacherSection) and read_about(teacher.path) is None:
            teacher = teacher.of  # what will be captured
        if hasattr(teacher, "tokenizer"):
            try:
                yield from _compared(recipe.student, key, teacher, method)
            except ValueError as error:
                problems.append(f"{key}: {error}")
    if problems:
        raise ValueError("\n".join(problems))


def _compared(student: Any, key: str, teacher: Any, method: Method | None) -> Iterator[str]:
    what = "tokenizers" if key == "teacher" else f"tokenizers, {key.removeprefix('teacher.')}"
    opened = []
    for model in (student, teacher):
        tokenizer, why_not = _opened(lambda model=model: (model.tokenizer(), model.config()), model)
        if tokenizer is None:
            yield f"{what}: not compared, {model.describe()} cannot be opened here ({why_not})"
            return
        opened.append(tokenizer)
    (ours, our_config), (theirs, their_config) = opened
    sizes = (c.get_text_config().vocab_size for c in (our_config, their_config))
    shared = shared_vocabulary(ours, theirs, *sizes)
    if method is not None and "teacher" in method.needs:
        shared.require()
    yield f"{what}: {len(shared)} ids shared{', identical' if shared.identical else ''}"
    for difference in shared.differences:
        yield f"{what}: note: {difference}"


def _ensemble(recipe: Recipe) -> Iterator[str]:
    """See that an ensemble's weights can be had from the data: for every domain, or from evaluation rows."""
    teacher, data = recipe.teacher, recipe.data
    if not isinstance(teacher, EnsembleSection):
        return
    weights = teacher.weights
    if getattr(recipe.method, "impl", "auto") == "triton" and (
        teacher.space != "log" or isinstance(weights, Confidence)
    ):
        raise ValueError("method.impl: triton has no kernel for an average of teachers; use auto or torch")
    if isinstance(weights, Learned) and not (data.eval or data.eval_rows or data.eval_fraction):
        raise ValueError(
            "teacher.weights: learned fits weights on evaluation rows, and there are none: set data.eval_rows, "
            "data.eval_fraction or data.eval"
        )
    if isinstance(weights, ByDomain):
        _routes(weights, {source.domain_name for source in [*data.train, *(data.eval or [])]})
    rule = "equal weights" if weights is None else f"weights {weights if isinstance(weights, list) else weights.name}"
    yield f"teacher: {teacher.describe()}; mean in {teacher.space} space, {rule}"


def _routes(weights: ByDomain, of_sources: set[str | None]) -> None:
    """Compare the table with the domains of the data's sources; of one that is None only the rows know."""
    domains = sorted(name for name in of_sources if name is not None)
    unknown, missing = sorted(weights.table.keys() - of_sources), sorted(set(domains) - weights.table.keys())
    if unknown and None not in of_sources:
        raise ValueError(
            f"teacher.weights.table: no source of the data has the domain {unknown[0]!r}; there are "
            f"{', '.join(map(repr, domains))}"
        )
    if missing and weights.default is None:
        raise ValueError(
            f"teacher.weights.table: no weights for the domain {missing[0]!r} of the data; name it, or set "
            "teacher.weights.default"
        )


def _captured(recipe: Recipe) -> Iterator[str]:
    """Compare a cached teacher with what its folder holds; sequence by sequence, `kdlm train` does before it starts."""
    teacher = recipe.teacher
    if not isinstance(teacher, CachedTeacherSection):
        return
    about = read_about(teacher.path)
    if about is None:
        yield f"teacher: {teacher.path} is not captured yet: kdlm capture with this recipe comes first"
        return
    if about.section() != teacher.format:
        raise ValueError(
            f"teacher.format: {teacher.path} holds {about.section()!r}, the recipe says {teacher.format!r}"
        )
    tokenizer, why_not = _opened(recipe.student.tokenizer, recipe.student)
    if tokenizer is None:
        yield f"teacher: {teacher.path} not compared with the data, no tokenizer ({why_not})"
        return
    now = made_with(recipe.data, tokenizer)
    if now["tokenizer"] != about.tokenizer:
        raise ValueError(
            f"teacher.path: {teacher.path} was captured with another tokenizer than the student's: its ids mean other "
            "tokens; capture anew into another folder"
        )
    yield f"teacher: {teacher.describe()}"
    for difference in differences_of(about.data, now):
        yield f"teacher: note: captured with other settings: {difference}; training refuses what was not captured"


def _data(recipe: Recipe) -> Iterator[str]:
    problems = []
    for split in ("train", "eval"):
        for index, source in enumerate(getattr(recipe.data, split) or []):
            if source.path.startswith("sandbox:"):
                yield f"data: {split}: {source.path}"
                continue
            try:
                opened = open_source(source, stream=True)
                yield f"data: {split}: {source.path} ({recognise(source, opened.columns).name})"
            except ValueError as error:
                if _looks_like_hub_id(source.path):
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


def _opened(read: Callable[[], Any], model: Any) -> tuple[Any, str]:
    """Return what `read` reads, or None and why not: a sandbox model not built yet, a hub that cannot be reached."""
    source = model.source if isinstance(model, Pruned) else getattr(model, "of", None) or model
    if isinstance(source, Sandbox):
        return (read(), "") if is_built(source.model) else (None, "the sandbox has not built it yet")
    try:
        return read(), ""
    except ValueError as error:
        if _looks_like_hub_id(source.config_from if isinstance(source, Fresh) else str(source.path)):
            return None, str(error)
        raise


def _looks_like_hub_id(path: str) -> bool:
    """Whether this is no path of this machine and could name something on the hub."""
    if path.startswith((".", "/", "~")):
        return False
    return not Path(path).suffix.lstrip(".").isalpha() and not Path(path).exists() and bool(HUB_ID.fullmatch(path))
