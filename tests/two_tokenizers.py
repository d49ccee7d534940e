"""Texts read by two of the sandbox's tokenizers, for tests of methods across tokenizers."""

from typing import Any, Literal

from readers import reader

from kdlm.data import Collator, DataSection, PairCollator
from kdlm.data.forms import recognise
from kdlm.data.two_readings import PairEncoder
from kdlm.signal import IGNORE_INDEX

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "import os\n",
    "# naïve — größe  🙂\nx = 1\n",
    "for item in range(10):\n    print(item, end='')\n",
    "class Thing:\n    pass\n",
    "y",
    "raise ValueError('no  such thing')\n",
    "while True: break\n",
]
OURS, THEIRS = "unigram-tiny", "tiny"


def own_rows(kind: str, texts: list[str] = TEXTS, *, ended: bool = True) -> list[dict[str, Any]]:
    """Rows of one reading, as of text of the student's own; ended by its end of sequence."""
    made = []
    for text in texts:
        ids = [*reader(kind)(text, add_special_tokens=False)["input_ids"], *[reader(kind).eos_token_id] * ended]
        made.append({"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]], "length": len(ids)})
    return made


def paired_rows(texts: list[str] = TEXTS, ours: str = OURS, theirs: str = THEIRS, length: int = 64) -> list[dict]:
    """Rows of both readings of the texts; one sequence a text."""
    section = DataSection.model_validate({"train": [{"path": "texts"}], "max_length": length})
    encode = PairEncoder(reader(ours), reader(theirs), section, recognise(section.train[0], ["text"]))
    encoded: list[Any] = encode([("a text", {"text": text}) for text in texts])
    return [
        {"input_ids": one.ids, "labels": one.labels, "length": len(one.ids), "index": number, **one.beside}
        for number, of_text in enumerate(encoded)
        for one in of_text.sequences
    ]


def unaligned(row: dict) -> dict:
    """The row without a chunk; what its tokens are trained on stays."""
    return {**row, "chunks": [-1] * len(row["chunks"]), "their_chunks": [-1] * len(row["their_chunks"])}


def untrained(row: dict) -> dict:
    nothing = {name: [IGNORE_INDEX] * len(row[name]) for name in ("labels", "their_labels")}
    return {**unaligned(row), **nothing}


def pair_collator(
    ours: str = OURS, theirs: str = THEIRS, layout: Literal["padded", "padding_free"] = "padded"
) -> PairCollator:
    return PairCollator(Collator(0, layout), Collator(0, layout), reader(ours), reader(theirs))
