"""Images with text: what a recipe says about them, and the rows that a chat template makes of conversations."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from kdlm.data.cache import cached_table, fingerprint, tokenizer_fingerprint
from kdlm.data.chat import ChatTemplate, template_text
from kdlm.data.encoding import trained_tokens
from kdlm.data.forms import Form, Message, read_chat, read_completion, read_weight, recognise
from kdlm.data.image_collate import ImageTextCollator
from kdlm.data.image_forms import place_images, references
from kdlm.data.load import Data
from kdlm.data.report import DataReport, SourceReport, Unusable
from kdlm.data.sections import Source, weighed
from kdlm.data.sources import Opened, open_source
from kdlm.data.tokenised import content_key
from kdlm.disk import cache_folder
from kdlm.section import Section
from kdlm.signal import domain_id

IMAGES = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
ROWS = pa.schema({"text": pa.string(), "spans": pa.list_(pa.int32()), "images": IMAGES, "place": pa.string()})


class ImageTextSection(Section):
    """Conversations about images, or prompts about images with their completions."""

    provides: ClassVar[frozenset[str]] = frozenset({"labels", "visual"})
    """What a method may need of it."""

    name: Literal["image_text"] = "image_text"
    train: list[Source] = Field(min_length=1)
    """Sources of training rows: `messages`, `conversations`, or `prompt` and `completion`, which become a user's and an
    assistant's turn. `<image>` in a text, or a part `{type: image}`, says where an image stands; where nothing does,
    all images of a row stand before its user's first words. Trained on is what the assistant says."""
    eval: list[Source] | None = Field(default=None, min_length=1)
    """Sources of evaluation rows."""
    images: str = "images"
    """Column of a row's image, or of the list of its images: paths, bytes, or images of the library `datasets`."""
    image_folder: str | None = None
    """Folder that relative paths of images are taken from; by default the one that kdlm is started in."""
    max_length: int = Field(default=2048, ge=2)
    """Most tokens in a sequence, with those of its images; what is longer is cut at its end."""
    chat_template: str | None = None
    """Jinja chat template, or the path of a `.jinja` file, instead of the processor's own."""
    chat_template_args: dict[str, Any] = {}
    """Variables for the chat template."""
    cache: str | None = None
    """Folder of rendered rows; $KDLM_CACHE, or else ~/.cache/kdlm, when not set."""

    @model_validator(mode="after")
    def _every_row_once(self) -> "ImageTextSection":
        if any(source.weight or "domain" in source.columns for source in [*self.train, *(self.eval or [])]):
            raise ValueError("image_text uses every row once, with its source's domain: remove `weight` and a `domain`")
        return self

    def load(self, processor: Any, teacher: Any = None) -> Data:
        """Read and render what the section names; `processor` is the student's, `teacher` the teacher's, if it has one.

        Raises ValueError when a source is missing, empty, not of its format or without a usable row.
        """
        report = DataReport([], notes=["tokens are counted with one for an image"])
        splits = {"train": self._table(self.train, processor, report.train)}
        if self.eval:
            splits["eval"] = self._table(self.eval, processor, report.eval)
        evaluated = splits["eval"][0] if "eval" in splits else None
        names = {key: name for key, (_, name) in splits.items()}
        collator: Any = ImageTextCollator(processor, self.max_length, _other(teacher, processor))
        return Data(splits["train"][0], evaluated, collator, report, names, {})

    def look(self) -> list[str]:
        """Return a line for each source. Raises ValueError for one that is not there or of no known form."""
        lines, problems = [], []
        for split in ("train", "eval"):
            for number, source in enumerate(getattr(self, split) or []):
                if source.path.startswith("sandbox:"):
                    lines.append(f"data: {split}: {source.path}")
                    continue
                try:
                    form = _form(source, open_source(source, stream=True), self.images)
                    lines.append(f"data: {split}: {source.path} ({form.name}, images in {self.images!r})")
                except ValueError as error:
                    problems.append(f"data.{split}.{number}: {error}")
        if problems:
            raise ValueError("\n".join(problems))
        return lines

    def _table(
        self, sources: list[Source], processor: Any, reports: list[SourceReport]
    ) -> tuple[datasets.Dataset, str]:
        """Return the rows of all sources below one another, numbered, and their fingerprint."""
        tables, names = [], []
        for source in sources:
            opened = open_source(source)
            renderer = Renderer(self, processor, source, opened, _form(source, opened, self.images))
            table, about = cached_table(
                cache_folder("data", self.cache),
                renderer.fingerprint,
                renderer.schema,
                renderer.rows(),
                lambda renderer=renderer: {"report": asdict(renderer.report)},
            )
            reports.append(SourceReport.from_dict(about["report"]))
            if weighed(sources) and "weight" not in table.column_names:
                table = table.add_column("weight", np.ones(len(table), dtype=np.float32))
            tables.append(table.add_column("domain", np.full(len(table), domain_id(source.domain_name or ""))))
            names.append(renderer.fingerprint)
        whole = datasets.concatenate_datasets(tables).remove_columns("key")
        return whole.add_column("index", np.arange(len(whole))), fingerprint(*names)


def _other(teacher: Any, student: Any) -> Any:
    """Return the teacher's processor where it reads images in another way than the student's, else None."""
    if teacher is None:
        return None
    readings = [{k: v for k, v in one.to_dict().items() if k != "chat_template"} for one in (teacher, student)]
    if teacher.image_token != student.image_token:
        raise ValueError(
            f"teacher: an image stands as {teacher.image_token!r} in its text, in the student's as "
            f"{student.image_token!r}: take models of one family"
        )
    return teacher if readings[0] != readings[1] else None


def _form(source: Source, opened: Opened, images: str) -> Form:
    if images not in opened.columns:
        raise ValueError(
            f"data source {source.path!r}: no column {images!r} of images; its columns are "
            f"{', '.join(map(repr, opened.columns))}: say which one with data.images"
        )
    form = recognise(source, [column for column in opened.columns if column != images])
    if form.name not in ("chat", "completion"):
        raise ValueError(f"data source {source.path!r}: {form.name} data has no answers about images")
    return form


class Renderer:
    """Turns the rows of one source into text by the chat template, with what is trained on and the images beside it."""

    def __init__(self, section: ImageTextSection, processor: Any, source: Source, opened: Opened, form: Form) -> None:
        template = template_text(section.chat_template) or processor.chat_template
        self.template = ChatTemplate(processor.tokenizer, template, section.chat_template_args)
        self.section, self.processor, self.source, self.opened, self.form = section, processor, source, opened, form
        self.report = SourceReport(source.path, form.name)
        self.fingerprint = fingerprint(
            "image_text",
            opened.digest(True),
            source.model_dump(include={"subset", "split", "limit", "sample_by", "format"}, mode="json"),
            asdict(form),
            section.model_dump(include={"images", "image_folder", "chat_template_args"}, mode="json"),
            template,
            tokenizer_fingerprint(processor.tokenizer),
            processor.image_token,
        )

    @property
    def schema(self) -> pa.Schema:
        """What the rows have, in the cache."""
        schema = ROWS.append(pa.field("key", pa.int64()))
        return schema.append(pa.field("weight", pa.float32())) if "weight" in self.form.columns else schema

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the usable rows, counting in the report. Raises ValueError when there is none."""
        self.report.restart()
        columns = [*self.form.columns.values(), self.section.images]
        for place, row in islice(self.opened.read(columns), self.source.limit):
            try:
                yield self._rendered(place, row)
            except Unusable as reason:
                self.report.refuse(place, reason)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        if not self.report.kept:
            lines = self.report.lines()
            raise ValueError("\n".join([f"data source {self.source.path!r}: no usable row", *lines]))

    def _rendered(self, place: str, row: dict[str, Any]) -> dict[str, Any]:
        images = references(row.get(self.section.images), self.section.image_folder)
        messages = place_images(self._messages(row), len(images))
        text, spans = self.template.render(messages, None)
        if (stand := text.count(self.processor.image_token)) != len(images):
            raise Unusable("malformed", f"the chat template puts {stand} images where the row has {len(images)}")
        tokens = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        trained = int(trained_tokens(tokens["offset_mapping"], spans).sum())
        if not trained:
            raise Unusable("no trained token")
        about = {"place": place, "key": content_key([text])}
        if "weight" in self.form.columns:
            about["weight"] = read_weight({"weight": row.get(self.form.columns["weight"])})
        self.report.keep([len(tokens["input_ids"])], trained, False)
        flat = [edge for span in spans for edge in span]
        return {"text": text, "spans": flat, "images": images, **about}

    def _messages(self, row: dict[str, Any]) -> list[Message]:
        missing = [theirs for ours, theirs in self.form.columns.items() if ours != "tools" and theirs not in row]
        if missing:
            raise Unusable("malformed", f"no column {missing[0]!r}")
        values = {ours: row.get(theirs) for ours, theirs in self.form.columns.items()}
        if self.form.name == "chat":
            return read_chat(values)
        prompt, completion = read_completion(values)
        asked: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answered: Any = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return [*asked, *answered]
