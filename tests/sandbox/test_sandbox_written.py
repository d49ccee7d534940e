from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlm.sandbox import build
from kdlm.sandbox.jsonl import read_jsonl
from kdlm.sandbox.progress import silent
from kdlm.sandbox.written import OPENING, WrittenText, go_on, line_openings

TINY = WrittenText("code-teacher-tiny", chars=4_000, seed=0)


def write(spec: WrittenText, folder: Path) -> list[dict]:
    folder.mkdir()
    figures = spec.make(folder, {name: build(name, progress=None) for name in spec.needs}, silent, "written")
    rows = read_jsonl(folder / "train.jsonl")
    assert figures["train"] == {"documents": len(rows), "chars": sum(len(row["text"]) for row in rows)}
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    before = torch.get_rng_state()
    written = write(TINY, tmp_path_factory.mktemp("text") / "first")
    assert torch.equal(torch.get_rng_state(), before), "whoever asks for text keeps their random state"
    return written


def test_as_much_is_written_as_was_asked_for(rows):
    chars = [len(row["text"]) for row in rows]
    assert sum(chars) >= TINY.chars > sum(chars[:-1])
    assert len({row["path"] for row in rows}) == len(rows) and all(set(row) == {"path", "text"} for row in rows)


def test_the_text_of_a_seed_is_the_same_every_time_and_another_seeds_is_another(rows, tmp_path):
    assert write(TINY, tmp_path / "again") == rows
    assert write(WrittenText("code-teacher-tiny", chars=1_000, seed=1), tmp_path / "other")[0] != rows[0]


def test_every_row_goes_on_from_a_line_of_the_corpus_in_the_writers_own_tokens(rows):
    tokenizer = AutoTokenizer.from_pretrained(build("code-teacher-tiny", progress=None))
    openings = line_openings(tokenizer, build("code", progress=None) / "train.jsonl")
    assert openings.shape[1] == OPENING
    starts = tuple(set(tokenizer.batch_decode(openings)))
    for row in rows:
        assert row["text"].startswith(starts)
        assert "\ufffd" not in row["text"] and "<eos>" not in row["text"]
    assert len({row["text"] for row in rows}) == len(rows)


def test_the_writer_is_sampled_from_all_of_its_distribution():
    """Transformers cuts to the 50 likeliest tokens unless told otherwise."""
    model = AutoModelForCausalLM.from_pretrained(build("code-teacher-tiny", progress=None)).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        written = go_on(model, torch.randint(4, 512, (16, OPENING)))
        logits = model(input_ids=written).logits[:, OPENING - 1 : -1]
    said = written[:, OPENING:, None]
    live = (said[..., 0] != model.config.pad_token_id) & (said[..., 0] != model.config.eos_token_id)
    beyond = ((logits > logits.gather(2, said)).sum(2) >= 50)[live].float().mean()
    ranked = logits.softmax(2).sort(descending=True).values
    expected = ranked[..., 50:].sum(2)[live].mean()
    assert expected > 0.1 and abs(beyond - expected) < 0.05
