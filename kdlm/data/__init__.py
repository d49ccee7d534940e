"""Data: from files, folders and hub ids to batches of token ids and labels. `load_data` is the way in."""

from kdlm.data.collate import Collator, Prefetched
from kdlm.data.load import Data, load_data
from kdlm.data.report import DataReport
from kdlm.data.sections import DataSection, Source

__all__ = ["Collator", "Data", "DataReport", "DataSection", "Prefetched", "Source", "load_data"]
