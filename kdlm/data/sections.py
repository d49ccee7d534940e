"""What a recipe says about data."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from kdlm.data.contexts import ContextSection
from kdlm.section import Section
from kdlm.signal import domain_id

Column = Literal[
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "text",
    "tools",
    "domain",
    "reference",
    "weight",
    "score",
    "context",
    "contexts",
    "bad_context",
]


class Source(Section):
    """One place that rows come from."""

    path: str = Field(min_length=1)
    """A file, a glob of files of one format, a folder, or a hub id (`owner/name`). Looked for on this machine first."""
    format: Literal["auto", "jsonl", "json", "parquet", "csv", "text"] = "auto"
    """Format of a file; `auto` goes by its suffix."""
    subset: str | None = None
    """Configuration of a hub data set or folder."""
    split: str | None = None
    """Split of a hub data set or folder, `train` when not set; slices such as `train[:10%]` work without streaming."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    columns: dict[Column, str] = {}
    """What kdlm calls a column -> what the source calls it, e.g. `{prompt: question, completion: answer}`. A column of
    names that is mapped to `domain` says of each row what `domain` says of a whole source; one mapped to
    `reference` is what the verifier compares the student's answer with, instead of its `column`; one of numbers that is
    mapped to `weight` says as how many copies of itself a row counts in the loss, one mapped to `score` is what the
    sampler `fixed` may choose by; one mapped to
    `context` is what the teacher reads beside the prompt (see `context` of the data); of one mapped to `contexts`, a
    list, it reads each by itself, and one mapped to `bad_context` is an example not to follow (see `unisd`)."""
    domain: str | None = Field(default=None, min_length=1)
    """What an ensemble of teachers knows this source's rows by; by default its path."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source in the mix, relative to the other weights. Without weights every row is used once."""
    limit: int | None = Field(default=None, gt=0)
    """Read only the first so many rows."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What is a row of a text file: a line, a run of lines between blank ones, or the whole file."""

    @property
    def domain_name(self) -> str | None:
        """The domain of all its rows; None where each row names its own."""
        return None if "domain" in self.columns else self.domain or self.path

    @model_validator(mode="after")
    def _one_domain(self) -> "Source":
        if self.domain is not None and "domain" in self.columns:
            raise ValueError("domain and columns.domain both say what a row's domain is: keep one")
        return self


def weighed(sources: list[Source]) -> bool:
    """Whether some source gives its rows weights; those of the others then have weight 1."""
    return any("weight" in source.columns for source in sources)


class DataSection(Section):
    """Which rows are trained and evaluated on, and how they become tokens."""

    provides: ClassVar[frozenset[str]] = frozenset({"labels", "alignment"})
    """What a method may need of it; alignment with the reading of a teacher that has a tokenizer."""

    name: Literal["text"] = Field("text", json_schema_extra={"optional": True})
    """What the data are; text where nothing is said."""

    train: list[Source] = Field(min_length=1)
    """Sources of training rows."""
    eval: list[Source] | None = Field(default=None, min_length=1)
    """Sources of evaluation rows. Without them, `eval_fraction` or `eval_rows` holds out a part of `train`."""
    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training rows that is held out for evaluation."""
    eval_rows: int | None = Field(default=None, gt=0)
    """Number of training rows that are held out for evaluation."""
    split_seed: int = 0
    """Which rows are held out. Not the run's seed, so that runs of different seeds share their evaluation rows."""
    max_length: int = Field(default=1024, ge=2)
    """Most tokens in one sequence, and in one packed row."""
    truncation: Literal["right", "drop"] = "right"
    """A conversation or completion that is too long: cut at its end, or left out. Plain text is split instead; of a
    preference, each side is cut for itself, and both are left out."""
    packing: Literal["none", "pack", "padding_free"] = "none"
    """`none` pads a batch to its longest row; `padding_free` lays its sequences end to end in one row; `pack` first
    fills rows of `max_length` with whole sequences. Attention never crosses from one sequence to another."""
    loss_on: Literal["auto", "assistant", "completion", "all"] = "auto"
    """Which tokens are trained on. `auto`: assistant turns of chat, completions, all of plain text."""
    chat_template: str | None = None
    """Jinja chat template, or the path of a `.jinja` file, instead of the tokenizer's own."""
    chat_template_args: dict[str, Any] = {}
    """Variables for the chat template, e.g. `{enable_thinking: false}`."""
    teacher_chat_template: str | None = None
    """The same for a teacher that reads the text with a tokenizer of its own, instead of that tokenizer's template."""
    teacher_max_length: int | None = Field(default=None, ge=2)
    """Most tokens of such a teacher in one sequence; by default `max_length`."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "all_exhausted"
    """Where a weighted mix ends: with the first source that is used up (no row twice), or with the last one (no row
    left out; smaller sources start again)."""
    context: ContextSection | None = None
    """How a prompt is written for a teacher that is told more than the student: what a source maps to `context` (a
    solution, a demonstration), or what a method finds among the student's completions."""
    streaming: bool = False
    """Read and tokenise training rows while training, without storing them. Evaluation rows are stored as ever."""
    shuffle_buffer: int = Field(default=1000, ge=0)
    """Sequences that a stream is shuffled among; 0 keeps the order of the sources. Stored rows are shuffled whole."""
    cache: str | None = None
    """Folder of tokenised data; $KDLM_CACHE, or else ~/.cache/kdlm, when not set."""

    @property
    def domain_names(self) -> dict[int, str]:
        """What the training sources call their domains, by number; those that a column names are not known."""
        return {domain_id(name): name for source in self.train if (name := source.domain_name) is not None}

    def with_reference(self, column: str | None) -> "DataSection":
        """Return the section whose sources carry a column as `reference`, where they do not map one themselves."""
        if column is None:
            return self

        def carrying(sources: list[Source]) -> list[Source]:
            return [one.model_copy(update={"columns": {"reference": column, **one.columns}}) for one in sources]

        return self.model_copy(
            update={"train": carrying(self.train), "eval": None if self.eval is None else carrying(self.eval)}
        )

    @model_validator(mode="after")
    def _agree(self) -> "DataSection":
        held_out = [key for key in ("eval", "eval_fraction", "eval_rows") if getattr(self, key) is not None]
        if len(held_out) > 1:
            raise ValueError(f"{' and '.join(held_out)} both say what to evaluate on: keep one")
        if self.context is not None and self.packing == "pack":
            raise ValueError("context: packed rows have no prompt of their own: use packing: none or padding_free")
        if self.context is not None and self.loss_on == "all":
            raise ValueError("context: it changes the prompt, which loss_on: all trains on: use loss_on: auto")
        if self.streaming and held_out and held_out != ["eval"]:
            raise ValueError(f"{held_out[0]} needs all rows, which a stream does not have: name `eval` sources instead")
        if any(source.weight for source in self.train) and not all(source.weight for source in self.train):
            raise ValueError("some train sources have a weight and some have none: give one to each, or to none")
        if any(source.weight for source in self.eval or []):
            raise ValueError("eval sources take no weight: every evaluation row is used once")
        return self
