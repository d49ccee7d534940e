"""Loading: from a recipe's data section to tokenised splits, and the collator that makes batches of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlm.data.cache import PACKED, TOKENS, cached_table, fingerprint
from kdlm.data.chat import template_text
from kdlm.data.collate import Collator, stacked
from kdlm.data.contexts import ContextCollator, ContextSection, Reprompt
from kdlm.data.mixing import held_out, mixed
from kdlm.data.packing import best_fit, packed_row
from kdlm.data.report import DataReport, SourceReport
from kdlm.data.sections import DataSection, Source, weighed
from kdlm.data.tensor_rows import TensorRows
from kdlm.data.tokenised import Tokenised, made_with, tokenised
from kdlm.data.two_readings import COLUMNS, PairCollator
from kdlm.disk import cache_folder

PACKED_AT_ONCE = 1000
"""Sequences of a stream that are packed among themselves."""


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on.

    Attributes:
        train: of text, rows with `input_ids`, `labels`, `length`, `index`, the number of the sequence among all those
            of its sources, `domain`, the number of its domain, and `weight` where a source maps it (lists of them, and
            `seq_lengths`, in a packed row). When streaming, an IterableDataset whose `index` is the place in the mix.
            Of anything else, what the section says that its rows hold.
        eval: the same, never a stream; None without evaluation data.
        collator: makes a batch of rows, in the layout that the section asks for.
        report: what became of the rows of every source. `print(data.report)`.
        fingerprints: for each split, a hash of all that determines its tokens.
        made_with: the settings behind the tokens, by name; of two readings, behind the teacher's.
        documents: for each stored split of text, which document the sequence of each `index` is a piece of, by a hash
            of the row that it was.
    """

    train: datasets.Dataset | datasets.IterableDataset | TensorRows
    eval: datasets.Dataset | TensorRows | None
    collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]
    report: DataReport
    fingerprints: dict[str, str]
    made_with: dict[str, Any]
    documents: dict[str, Int[np.ndarray, "sequences"]] = field(default_factory=dict)


Read = Callable[..., Tokenised]
"""A source -> what becomes of its rows."""


class Split(NamedTuple):
    """The rows of a split, the hash of all that determines them, and the document of each sequence by its index."""

    rows: Any
    fingerprint: str
    documents: Any = None


def load_data(
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None = None,
    *,
    seed: int = 0,
) -> Data:
    """Read, tokenise, split, mix and pack what a data section names; `tokenizer` is the student's.

    With `teacher`, another tokenizer, every row is read twice and aligned (see `kdlm.data.two_readings`).
    `seed` shuffles a stream; stored rows are left in the order of their sources, for a sampler to shuffle.
    Raises ValueError when a source is missing, empty, not of its format or without a usable row.
    """
    report = DataReport([])
    read = partial(tokenised, section=section, tokenizer=tokenizer, teacher=teacher)
    splits = {"train": _streamed(section, read, seed, report)} if section.streaming else _stored(section, read, report)
    if section.eval:
        table, _, name = _table(section.eval, section, read, report.eval)
        splits["eval"] = _packed(Split(table, name, table.data.column("key").to_numpy()), section, report, "eval")
    return Data(
        train=splits["train"].rows,
        eval=splits["eval"].rows if "eval" in splits else None,
        collator=_collator(section, tokenizer, teacher),
        report=report,
        fingerprints={name: split.fingerprint for name, split in splits.items()},
        made_with=made_with(section, tokenizer, teacher),
        documents={name: split.documents for name, split in splits.items() if split.documents is not None},
    )


def _collator(section: DataSection, tokenizer: Any, teacher: Any) -> Collator | PairCollator | ContextCollator:
    collator = text_collator("padded" if section.packing == "none" else "padding_free", tokenizer, teacher)
    if section.context is None:
        return collator
    if isinstance(collator, PairCollator):
        raise ValueError(
            "data.context: a teacher with another tokenizer cannot be told more than the student: remove it"
        )
    template = template_text(section.chat_template)
    return ContextCollator(collator, Reprompt(tokenizer, section.context, template, section.chat_template_args))


def collator_for(rows: Any, tokenizer: Any, teacher: Any = None) -> Callable[[Sequence[dict[str, Any]]], dict]:
    """Return the collator that rows want: `stacked` without token ids, `PairCollator` with a teacher's tokenizer,
    `ContextCollator` where rows say what they ask.
    """
    first = next(iter(rows), {}) if rows is not None else {}
    if first and "input_ids" not in first:
        return stacked
    collator = text_collator("padded", tokenizer, teacher)
    if {"asked", "context_prompt"} & set(first) and isinstance(collator, Collator):
        return ContextCollator(collator, Reprompt(tokenizer, ContextSection()))
    return collator


def text_collator(
    layout: Literal["padded", "padding_free"], tokenizer: Any, teacher: Any = None
) -> Collator | PairCollator:
    """Return what makes batches of one reading of text, or of two where the teacher has a tokenizer of its own."""
    ours = Collator(pad_id(tokenizer), layout)
    return ours if teacher is None else PairCollator(ours, Collator(pad_id(teacher), layout), tokenizer, teacher)


def pad_id(tokenizer: Any) -> int:
    """Return the id to pad with: any would do, since neither attention nor loss sees it; 0 without a tokenizer."""
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(tokenizer, "eos_token_id", None) if pad is None else pad
    return pad if isinstance(pad, int) else 0


def _table(
    sources: list[Source], section: DataSection, read: Read, reports: list[SourceReport]
) -> tuple[datasets.Dataset, list[int], str]:
    """Return the sequences of all sources below one another, how many each has, and their fingerprint."""
    root, tables, names = cache_folder("data", section.cache), [], []
    for found in _opened(sources, read):
        table, report = found.table(root)
        if found.domain is not None:
            table = table.add_column("domain", np.full(len(table), found.domain))
        if weighed(sources) and "weight" not in table.column_names:
            table = table.add_column("weight", np.ones(len(table), dtype=np.float32))
        reports.append(report)
        tables.append(table)
        names.append(found.fingerprint)
    whole = datasets.concatenate_datasets(tables)
    return whole.add_column("index", np.arange(len(whole))), [len(table) for table in tables], fingerprint(*names)


def _opened(sources: list[Source], read: Callable[[Source], Tokenised]) -> list[Tokenised]:
    """Return what becomes of each source. Raises ValueError where some hold preferences and others do not."""
    found = [read(source) for source in sources]
    kinds = {one.encoder.form.name == "preference": source.path for source, one in zip(sources, found, strict=True)}
    if len(kinds) > 1:
        raise ValueError(
            f"data: {kinds[True]!r} holds preferences and {kinds[False]!r} does not: a method takes either; of a "
            "preference, columns: {prompt: prompt, completion: chosen} takes the chosen side"
        )
    return found


def _stored(section: DataSection, read: Read, report: DataReport) -> dict[str, Split]:
    """Return the training rows, and the rows held out from them if any are."""
    table, sizes, name = _table(section.train, section, read, report.train)
    keys = table.data.column("key").to_numpy()
    out = np.zeros(len(table), dtype=bool)
    if section.eval_rows or section.eval_fraction:
        count = section.eval_rows or max(1, round((section.eval_fraction or 0) * len(np.unique(keys))))
        out = held_out(keys, count, section.split_seed)
        report.notes.append(f"held out for evaluation: {out.sum()} of {len(out)} sequences")
        name = fingerprint(name, count, section.split_seed)
    starts = np.cumsum([0, *sizes])
    kept = [begin + np.flatnonzero(~out[begin:end]) for begin, end in pairwise(starts)]
    for source, rows in zip(section.train, kept, strict=True):
        if not len(rows):
            raise ValueError(f"data source {source.path!r}: all of its rows are held out, none is left to train on")
    weights = _weights(section)
    order = np.fromiter(mixed([rows.__iter__ for rows in kept], weights, section.stopping_strategy), dtype=np.int64)
    train = Split(table.select(order), fingerprint(name, "train", weights, section.stopping_strategy), keys)
    splits = {"train": _packed(train, section, report, "train")}
    if out.any():
        held = Split(table.select(np.flatnonzero(out)), fingerprint(name, "eval"), keys)
        splits["eval"] = _packed(held, section, report, "eval")
    return splits


def _weights(section: DataSection) -> list[float] | None:
    return [source.weight for source in section.train if source.weight is not None] or None


def _packed(split: Split, section: DataSection, report: DataReport, name: str) -> Split:
    """Return the split as the section lays it out: as it is, or in packed rows."""
    rows = split.rows.remove_columns("key").with_format("numpy")
    if section.packing != "pack":
        return Split(rows, split.fingerprint, split.documents)
    packed_name = fingerprint(split.fingerprint, "packed", section.max_length)

    schema = PACKED
    for column in (*COLUMNS, "their_lengths") if "chunks" in rows.column_names else ():
        schema = schema.append(pa.field(column, TOKENS))
    if "weight" in rows.column_names:
        schema = schema.append(pa.field("weight", pa.list_(pa.float32())))

    def packed() -> Iterator[dict[str, Any]]:
        for members in best_fit(rows["length"][:].tolist(), section.max_length):
            yield packed_row(rows[i] for i in members)

    table, _ = cached_table(cache_folder("data", section.cache), packed_name, schema, packed(), dict)
    # Not in the cache: what a domain is called changes nothing about how rows are packed.
    domains, index = _by_index(rows), table.data.column("index").combine_chunks()
    ids = pa.array(domains[index.values.to_numpy()])
    table = table.add_column("domain", pa.ListArray.from_arrays(index.offsets, ids))
    full = sum(table.data.column("length").to_pylist()) / (len(table) * section.max_length)
    report.notes.append(f"packed {name}: {len(rows)} sequences in {len(table)} rows, {full:.0%} full")
    return Split(table.with_format("numpy"), packed_name, split.documents)


def _by_index(rows: datasets.Dataset) -> np.ndarray:
    """Return the domain of each sequence, at the place of its `index`; what is in other splits is 0."""
    index, domain = (np.asarray(rows[name][:]) for name in ("index", "domain"))
    found = np.zeros(int(index.max()) + 1, dtype=np.int64)
    found[index] = domain
    return found


def _streamed(section: DataSection, read: Read, seed: int, report: DataReport) -> Split:
    """Return the training rows as a stream, whose reports grow as it is read."""
    found = _opened(section.train, partial(read, stored=False))
    report.train.extend(one.report for one in found)
    name = fingerprint(
        [one.fingerprint for one in found], _weights(section), section.stopping_strategy, section.packing
    )
    # a tuple: `datasets` would take a list for shards, and hand out one source at a time
    stream = datasets.IterableDataset.from_generator(_stream, gen_kwargs={"section": section, "found": tuple(found)})
    if section.shuffle_buffer:
        stream = stream.shuffle(seed=seed, buffer_size=section.shuffle_buffer)
    return Split(stream, name)


def _stream(section: DataSection, found: tuple[Tokenised, ...]) -> Iterator[dict[str, Any]]:
    starts = [partial(one.sequences, warn=True) for one in found]
    rows = mixed(starts, _weights(section), section.stopping_strategy)
    alike = {"weight": 1.0} if weighed(section.train) else {}
    numbered = ({**alike, **row, "index": number} for number, row in enumerate(rows))
    if section.packing != "pack":
        for row in numbered:
            del row["key"]
            yield row
        return
    while some := list(islice(numbered, PACKED_AT_ONCE)):
        for members in best_fit([row["length"] for row in some], section.max_length):
            yield packed_row(some[i] for i in members)
