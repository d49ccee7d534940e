"""What a run is made of, opened: the data, the student's tokenizer, the student, the ids that it shares with others."""

from typing import Any

from kdlm import deepspeed
from kdlm.data import Data, DataSection, ImageTextSection, TextClassesSection, load_data
from kdlm.data.chat import template_text
from kdlm.data.vocabulary import intersection, shared_vocabulary
from kdlm.models import adapt, fake_quantise
from kdlm.parallelism import refuse_with_slices
from kdlm.recipe import Recipe, across, reference_column
from kdlm.teachers import VisionLanguageTeacherSection, teachers_of


def loaded(recipe: Recipe) -> tuple[Any, Data]:
    """Return the student's tokenizer, where its data are text, or its processor, with images; and the data."""
    if isinstance(recipe.data, ImageTextSection):
        processor = recipe.student.processor()
        if recipe.data.chat_template is not None:
            processor.chat_template = template_text(recipe.data.chat_template)
        teacher = recipe.teacher
        theirs = teacher.processor() if isinstance(teacher, VisionLanguageTeacherSection) else None
        return processor, recipe.data.load(processor, theirs)
    if isinstance(recipe.data, TextClassesSection):
        tokenizer = recipe.student.tokenizer()
        return tokenizer, recipe.data.load(tokenizer)
    if not isinstance(recipe.data, DataSection):
        return None, recipe.data.load(recipe.seed)
    tokenizer = recipe.student.tokenizer()
    if recipe.data.chat_template is not None:
        tokenizer.chat_template = template_text(recipe.data.chat_template)  # the student is saved with what it learnt
    column = reference_column(recipe)
    theirs = recipe.teacher.tokenizer() if across(recipe) else None  # pyright: ignore[reportOptionalMemberAccess]
    return tokenizer, load_data(recipe.data.with_reference(column), tokenizer, theirs, seed=recipe.seed)


def other_rows(recipe: Recipe, tokenizer: Any) -> Any:
    """Return the rows of the text on which forgetting is measured too, read as the data are; None without it."""
    if recipe.evaluation is None or recipe.evaluation.other is None:
        return None
    alone = {"eval": None, "eval_rows": None, "eval_fraction": None, "streaming": False}
    data: Any = recipe.data  # text: other data have no such evaluation
    section = data.model_copy(update={"train": recipe.evaluation.other, **alone})
    return load_data(section, tokenizer, seed=recipe.seed).train


def opened_student(recipe: Recipe, data: Data) -> Any:
    """Return the student as it begins, with its adapters."""
    student, lora = loaded_student(recipe, data), getattr(recipe.student, "lora", None)
    for key in ("lora", "quantization_aware"):
        if getattr(recipe.student, key, None) is not None:
            refuse_with_slices(student, f"student.{key}")
    student = student if lora is None else adapt(student, lora)
    few_bits = getattr(recipe.student, "quantization_aware", None)
    return student if few_bits is None else fake_quantise(student, few_bits)


def opened_whole(recipe: Recipe) -> Recipe:
    """Return the recipe with a student that one rank can open."""
    if not getattr(recipe.student, "tensor_parallel", False):
        return recipe
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"tensor_parallel": False})})


def loaded_student(recipe: Recipe, data: Data) -> Any:
    """Return the student as it begins: its weights, or what its section makes of the training rows."""
    section: Any = recipe.student
    with deepspeed.loading_whole():
        return section.load_from(data.train, recipe.seed) if hasattr(section, "load_from") else section.load()


def common_ids(recipe: Recipe, tokenizer: Any, student: Any, teacher: Any) -> Any:
    """Return the ids that student and teacher, or all its members, share; None where nothing is known of a tokenizer.

    Raises ValueError, naming the teacher, where one cannot be compared.
    """
    if not isinstance(recipe.data, DataSection | ImageTextSection) or across(recipe):
        return None
    if student.get_output_embeddings() is None:  # a classifier of texts
        return None
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    sections, built = teachers_of(recipe.teacher), getattr(teacher, "members", [teacher])
    ours = student.get_output_embeddings().weight.shape[0]
    shared = []
    for (key, section), one in zip(sections, built, strict=True) if sections else ():
        if hasattr(section, "tokenizer") and hasattr(one, "vocab_size"):
            try:
                shared.append(shared_vocabulary(tokenizer, section.tokenizer(), ours, one.vocab_size).require())
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    return intersection(shared) if shared else None
