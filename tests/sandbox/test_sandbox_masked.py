"""The masked language models of the sandbox, and their sums."""

from typing import get_args

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from kdlm.models.masked_language_models import SandboxMasked
from kdlm.sandbox import build
from kdlm.sandbox.catalog import CATALOG
from kdlm.sandbox.jsonl import read_jsonl
from kdlm.sandbox.masked_language_models import MaskedModel, bound, encoded


def test_the_section_names_every_masked_model_of_the_catalogue() -> None:
    models = {name for name, entry in CATALOG.items() if isinstance(entry.spec, MaskedModel)}
    assert set(get_args(SandboxMasked)) == models


def test_sums_are_right_of_one_width_and_their_splits_do_not_meet() -> None:
    folder = build("sums", progress=None)
    rows = {split: list(read_jsonl(folder / f"{split}.jsonl")) for split in ("train", "eval")}
    assert (len(rows["train"]), len(rows["eval"])) == (9000, 1000)
    assert len({row["prompt"] for split in rows.values() for row in split}) == 10_000
    for row in [*rows["train"], *rows["eval"]]:
        first, second = row["prompt"].rstrip("=").split("+")
        assert int(first) + int(second) == int(row["answer"]) and row["completion"] == row["answer"]
        assert (len(first), len(second), len(row["answer"])) == (2, 2, 3)


def test_the_tiny_model_opens_with_its_mask_token_and_has_learnt_something() -> None:
    folder, fresh = build("masked-tiny", progress=None), build("masked-student", progress=None)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.mask_token_id == model.config.mask_token_id == len(tokenizer) - 1
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id
    ids, given = encoded(tokenizer, build("sums", progress=None) / "eval.jsonl")
    assert ids.shape == (1000, 10) and given == 6
    with torch.no_grad():
        trained, untrained = (
            bound(AutoModelForMaskedLM.from_pretrained(one), ids, given, torch.Generator().manual_seed(0)).item()
            for one in (folder, fresh)
        )
    assert trained < 1.5 < 4 < untrained
