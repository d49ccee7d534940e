"""Signals on disk: what a capture writes and a cached teacher reads."""

from kdlm.store.folder import TOKENIZER, About, Store, read_about, save_head, write_about
from kdlm.store.formats import AnyFormat, Format, HiddenFormat, LogProbsFormat, Record, SampledFormat, TopKFormat
from kdlm.store.sequences import Asked, asked, cut, of_batch
from kdlm.store.shards import INDEX, ShardWriter, sealed
from kdlm.store.units import Unit, plan, rows_of, sequences_of

__all__ = [
    "INDEX",
    "TOKENIZER",
    "About",
    "AnyFormat",
    "Asked",
    "Format",
    "HiddenFormat",
    "LogProbsFormat",
    "Record",
    "SampledFormat",
    "ShardWriter",
    "Store",
    "TopKFormat",
    "Unit",
    "asked",
    "cut",
    "of_batch",
    "plan",
    "read_about",
    "rows_of",
    "save_head",
    "sealed",
    "sequences_of",
    "write_about",
]
