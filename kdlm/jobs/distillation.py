"""distillation: what students and baselines keep of the teacher, token by token, on given text or chats."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kdlm.data import DataSection, Source, load_data
from kdlm.data.vocabulary import shared_vocabulary
from kdlm.jobs.cache import Cache
from kdlm.measuring import measure
from kdlm.section import Section

if TYPE_CHECKING:
    from kdlm.jobs.job import Job


class Distillation(Section):
    """What students and baselines are measured on beside the teacher, all of them in this process (`name: hf`)."""

    data: list[Source] = Field(min_length=1)
    """Text or chats, as in a recipe: [{path: "sandbox:code/eval", limit: 18}]."""
    max_length: int = Field(1024, ge=2)
    """Most tokens in one sequence; plain text is split."""
    loss_on: Literal["auto", "assistant", "completion", "all"] = "auto"
    """Which tokens count. `auto`: assistant turns of chat, completions, all of plain text."""
    start: str | None = None
    """Name of the model of this job that the students were before: tells what they forgot, as `kl_to_start`."""
    batch_size: int = Field(8, ge=1)
    """Sequences read together."""

    def rows(self) -> DataSection:
        """Return the section that loads the data."""
        return DataSection(train=self.data, max_length=self.max_length, loss_on=self.loss_on)


def teacher_of(job: "Job", section: Distillation) -> str:
    """Return the name of the teacher in this process. Raises ValueError naming the key where a model is missing."""
    here = job.here()
    teacher = next((name for name in job.of("teacher") if name in here), None)
    if teacher is None:
        raise ValueError("distillation: it is measured beside a teacher in this process (name: hf, role: teacher)")
    if section.start is not None and section.start not in here:
        raise ValueError(f"distillation.start: {section.start!r} is no model of this job in this process (name: hf)")
    return teacher


def distilled(job: "Job", section: Distillation, hashes: dict[str, str], cache: Cache) -> dict[str, Any]:
    """Return, for each student and baseline in this process, what `kdlm.measuring.measure` says of it.

    A teacher with another tokenizer reads the text for itself, and is compared as far as that goes. What was measured
    before, of the same weights on the same tokens, is taken from the cache. Raises ValueError naming the key.
    """
    teacher = teacher_of(job, section)
    here = job.here()
    baseline = next((name for name in job.of("baseline") if name in here), None)
    opened: dict[str, Any] = {}

    def model(name: str | None) -> Any:
        if name is None:
            return None
        if name not in opened:
            opened[name] = here[name].load(f"models.{name}")[0]
        return opened[name]

    found = {}
    for name in (name for name in [*job.of("student"), *job.of("baseline")] if name in here):
        beside = {"start": section.start, "baseline": None if name == baseline else baseline}
        tokenizer, theirs = (here[one].tokenizer(f"models.{one}") for one in (name, teacher))
        heads = [here[one].rows_of_head(f"models.{one}") for one in (name, teacher)]
        shared = shared_vocabulary(tokenizer, theirs, *heads)
        other = theirs if shared.conflicts else None
        try:
            data = load_data(section.rows(), tokenizer, other)
        except ValueError as error:
            raise ValueError(f"distillation.data: {error}") from error
        models = [hashes[one] if one else None for one in (name, teacher, *beside.values())]
        path = cache.path(hashes[name], "distillation", [models, data.fingerprints["train"], section.batch_size])
        if (kept := cache.read(path)) is None:
            rows: Any = data.train
            kept = measure(
                model(name),
                model(teacher),
                rows,
                tokenizer,
                their_tokenizer=other,
                **{key: model(one) for key, one in beside.items()},
                vocab=None if other is not None else shared.ids,
                documents=data.documents.get("train"),
                batch_size=section.batch_size,
            )
            cache.write(path, kept)
        found[name] = kept
        if name not in (teacher, baseline, section.start):
            opened.pop(name, None)
    return found
