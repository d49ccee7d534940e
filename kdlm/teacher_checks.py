"""What `kdlm check` looks at of a teacher: its signals, server, tokenizer, capture, and the weights of an ensemble.

Before all that: whether the student is of the kind, causal or masked, that method and rollouts are for.
"""

from collections.abc import Iterator
from typing import Any

from kdlm import capacity_gap
from kdlm.data import DataSection
from kdlm.data.alignment import Aligner
from kdlm.data.forms import recognise
from kdlm.data.own_text import NOT_EXACT
from kdlm.data.paired_vocabulary import PairedVocabulary
from kdlm.data.sources import open_source
from kdlm.data.tokenised import made_with
from kdlm.data.two_readings import PairEncoder
from kdlm.data.vocabulary import shared_vocabulary
from kdlm.looking import opened
from kdlm.methods import GDSD, AlignedMethod, Method, PolicyMethod, Step, TokenMethod
from kdlm.models import MaskedStudent, TextClassifierStudent
from kdlm.recipe import Recipe, across
from kdlm.rollouts import check_engine
from kdlm.signal import Sampled, TopK
from kdlm.spelling import spelling_of
from kdlm.store import read_about
from kdlm.teachers import ByDomain, CachedTeacherSection, Confidence, EnsembleSection, Learned, teachers_of
from kdlm.teachers.cached import differences_of


def masking(recipe: Recipe, method: Method | None) -> Iterator[str]:
    """See that method and rollouts are for the kind of language model that the student is."""
    if method is None:
        return
    masked, name, rollouts = isinstance(recipe.student, MaskedStudent), recipe.method.name, recipe.rollouts
    if masked and "unmasking" not in method.needs and not method.any_text_model:
        raise ValueError(f"student: {name} is not for masked language models, and this is one: use masked_kd or gdsd")
    if "unmasking" in method.needs and not masked:
        raise ValueError(f"student: {name} is for masked language models: use name: masked_lm")
    if isinstance(recipe.student, TextClassifierStudent) and isinstance(recipe.data, DataSection):
        if not method.any_text_model:
            raise ValueError(f"student: text_classifier predicts no tokens, which {name} wants: use text_classes data")
        yield "student: a classifier, which learns from the inside of its teacher alone"
    if rollouts is not None:
        check_engine(rollouts, masked=masked)
    if isinstance(method, GDSD) and rollouts is not None:
        steps = rollouts.every * rollouts.reuse
        if method.inner_steps != steps or rollouts.asynchronous:
            raise ValueError(
                f"method.inner_steps: {method.inner_steps}, and a generation is trained on for {steps} steps "
                "(rollouts.every * reuse): set the same number, and rollouts.asynchronous: false"
            )
    if masked:
        yield f"student: masked, {name} hides tokens of its text"


def capacity(recipe: Recipe, method: Method | None) -> Iterator[str]:
    """Say how much larger a teacher is than the student, and note one that is too large (arXiv 2311.07052).

    Only where both are causal language models of transformers whose configurations can be opened here.
    """
    if method is None or "teacher" not in method.needs:
        return
    sizes = {key: _size(model) for key, model in (("student", recipe.student), *teachers_of(recipe.teacher))}
    student, teachers = sizes.pop("student"), {key: size for key, size in sizes.items() if size}
    if not student or not teachers:
        return
    yield from capacity_gap.advice(student, teachers)
    if careful := capacity_gap.warning(student, teachers):
        yield f"teacher: note: {careful}"


def _size(model: Any) -> int | None:
    """Return how many weights a causal language model has, None of any other or where it cannot be known here."""
    try:
        config, _ = opened(model.config, model) if callable(getattr(model, "config", None)) else (None, "")
        return None if config is None else capacity_gap.parameters(config)
    except (ValueError, ImportError):  # what is wrong is said elsewhere
        return None


def signals(recipe: Recipe, method: Method | None) -> Iterator[str]:
    given = getattr(recipe.teacher, "signals", None)
    if not isinstance(method, TokenMethod) or given is None:
        return
    if isinstance(method, AlignedMethod) and not method.signals & given:
        accepted, offered = (", ".join(sorted(s.__name__ for s in kinds)) for kinds in (method.signals, given))
        raise ValueError(f"method: {recipe.method.name} takes a signal of {accepted}; this teacher gives {offered}")
    if isinstance(method, PolicyMethod) and not method.signals & given:
        accepted, offered = (", ".join(sorted(s.__name__ for s in kinds)) for kinds in (method.signals, given))
        raise ValueError(f"method: {recipe.method.name} takes a signal of {accepted}; this teacher gives {offered}")
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


def server(recipe: Recipe) -> Iterator[str]:
    """Ask a teacher's server what it is. It may not be up yet, or be reached from another machine: that is no error."""
    teacher: Any = recipe.teacher
    if hasattr(teacher, "look"):
        try:
            yield f"teacher: {teacher.url} {teacher.look()}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"teacher: not looked at here ({error})"


def tokenizers(recipe: Recipe, method: Method | None) -> Iterator[str]:
    problems = []
    if across(recipe) and recipe.teacher is not None and not hasattr(recipe.teacher, "tokenizer"):
        raise ValueError(
            f"teacher: {recipe.method.name} reads the text as the teacher does, and {recipe.teacher.name} "
            "does not say which tokenizer that takes"
        )
    for key, teacher in teachers_of(recipe.teacher):
        if isinstance(teacher, CachedTeacherSection) and read_about(teacher.path) is None:
            teacher = teacher.of  # what will be captured
        if hasattr(teacher, "tokenizer"):
            try:
                yield from _compared(recipe.student, key, teacher, method)
            except ValueError as error:
                problems.append(f"{key}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    if across(recipe) and isinstance(recipe.teacher, EnsembleSection):
        members: list[Any] = list(recipe.teacher.members)
        if all(opened(member.tokenizer, member)[0] is not None for member in members if hasattr(member, "tokenizer")):
            recipe.teacher.tokenizer()


def _compared(student: Any, key: str, teacher: Any, method: Method | None) -> Iterator[str]:
    what = "tokenizers" if key == "teacher" else f"tokenizers, {key.removeprefix('teacher.')}"
    models = (student, teacher)
    found = [opened(lambda model=model: (model.tokenizer(), model.config()), model) for model in models]
    for model, (tokenizer, why_not) in zip(models, found, strict=True):
        if tokenizer is None:
            yield f"{what}: not compared, {model.describe()} cannot be opened here ({why_not})"
            return
    (ours, our_config), (theirs, their_config) = (one for one, _ in found)
    sizes = (c.get_text_config().vocab_size for c in (our_config, their_config))
    shared = shared_vocabulary(ours, theirs, *sizes)
    if isinstance(method, AlignedMethod):
        spellings = spelling_of(ours), spelling_of(theirs)
        Aligner(*spellings)
        method.introduce(*spellings)
        matched = len(PairedVocabulary(*spellings).matched[0])
        yield f"{what}: {len(ours)} and {len(theirs)} ids, {matched} of one meaning; readings aligned by bytes"
        if not shared.conflicts:
            alike = "are identical" if shared.identical else "differ in added tokens only"
            yield f"{what}: note: the two {alike}: logit_kd compares whole distributions, at every token"
        return
    if method is not None and {"teacher", "teacher.layers", "teacher.classes"} & method.needs:
        shared.require()
    yield f"{what}: {len(shared)} ids shared{', identical' if shared.identical else ''}"
    for difference in shared.differences:
        yield f"{what}: note: {difference}"


def second_reading(recipe: Recipe, method: Method | None) -> Iterator[str]:
    """See that a teacher with another tokenizer can read the data, and what the student will write."""
    data: Any = recipe.data
    if not across(recipe):
        for name in ("teacher_chat_template", "teacher_max_length"):
            if getattr(data, name) is not None:
                yield f"data: note: {name} does nothing here: with {recipe.method.name} both read one tokenization"
        return
    if not hasattr(recipe.teacher, "tokenizer"):
        return
    sections = [recipe.student, *(section for _, section in teachers_of(recipe.teacher))]
    if any(opened(section.tokenizer, section)[0] is None for section in sections):
        return
    ours, theirs = recipe.student.tokenizer(), recipe.teacher.tokenizer()  # pyright: ignore[reportOptionalMemberAccess]
    if method is not None and "rollouts" in method.needs and not spelling_of(ours).exact:
        raise ValueError(f"method.student_share: {NOT_EXACT}: set 0")
    problems = []
    for split in ("train", "eval"):
        for index, source in enumerate(getattr(data, split) or []):
            try:
                form = recognise(source, open_source(source, stream=True).columns)
            except ValueError:  # said already where sources are looked at
                continue
            try:
                PairEncoder(ours, theirs, data, form)
            except ValueError as error:
                problems.append(f"data.{split}.{index}: {error}")
    if problems:
        raise ValueError("\n".join(problems))


def ensemble(recipe: Recipe) -> Iterator[str]:
    """See that an ensemble's weights can be had from the data: for every domain, or from evaluation rows."""
    teacher, data = recipe.teacher, recipe.data
    if not isinstance(teacher, EnsembleSection) or not isinstance(data, DataSection):
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


def captured(recipe: Recipe) -> Iterator[str]:
    """Compare a cached teacher with what its folder holds; sequence by sequence, `kdlm train` does before it starts."""
    teacher, data = recipe.teacher, recipe.data
    if not isinstance(teacher, CachedTeacherSection) or not isinstance(data, DataSection):
        return
    about = read_about(teacher.path)
    if about is None:
        yield f"teacher: {teacher.path} is not captured yet: kdlm capture with this recipe comes first"
        return
    if about.section() != teacher.format:
        raise ValueError(
            f"teacher.format: {teacher.path} holds {about.section()!r}, the recipe says {teacher.format!r}"
        )
    tokenizer, why_not = opened(recipe.student.tokenizer, recipe.student)
    if tokenizer is None:
        yield f"teacher: {teacher.path} not compared with the data, no tokenizer ({why_not})"
        return
    now = made_with(data, tokenizer, teacher.tokenizer() if across(recipe) else None)
    if now["tokenizer"] != about.tokenizer:
        whose = "the teacher's own" if across(recipe) else "the student's"
        raise ValueError(
            f"teacher.path: {teacher.path} was captured with another tokenizer than {whose}, with which "
            f"{recipe.method.name} asks: its ids mean other tokens; capture anew into another folder"
        )
    yield f"teacher: {teacher.describe()}"
    for difference in differences_of(about.data, now):
        yield f"teacher: note: captured with other settings: {difference}; training refuses what was not captured"
