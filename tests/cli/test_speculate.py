"""`kdlm speculate`: two folders and a file of prompts to a report, and what is wrong with them in words."""

import json
from pathlib import Path

import pytest
import torch
from tiny_folders import tiny_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdlm import cli

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def weighted(folder: str, **changes: int) -> str:
    """Give a tiny folder random weights, with sizes changed."""
    config = AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(len(folder))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("pair")
    return weighted(tiny_folder(root / "target", layers=2)), weighted(tiny_folder(root / "draft"), vocab_size=272)


def written(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def speculate(target: str, draft: str, prompts: str, *more: str) -> int:
    arguments = ["--target", target, "--draft", draft, "--prompts", prompts, "--max-new-tokens", "6", "--device", "cpu"]
    return cli.main(["speculate", *arguments, *more])


def test_a_pair_is_measured_from_the_command_line(folders, tmp_path, capsys):
    prompts = written(tmp_path / "p.jsonl", {"prompt": "the quick"}, {"prompt": "lazy dog"}, {"prompt": "and"})
    assert speculate(*folders, prompts, "--drafted", "3", "--limit", "2", "--json", "--temperature", "0") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["target"], report["draft"], report["drafted"]) == (*folders, 3)
    assert (report["prompts"], report["emitted"], report["same_texts"]) == (2, 12, 2)
    assert speculate(*folders, prompts) == 0
    assert "block efficiency: " in capsys.readouterr().out


def test_prompts_come_from_text_from_messages_and_from_prompts(folders, tmp_path, capsys):
    from kdlm.speculate import read_prompts

    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    tokenizer.chat_template = CHAT
    turns = [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "fox"}]
    for row, text in (
        ({"prompt": "the quick brown"}, "the quick brown"),
        ({"prompt": turns[:1]}, "<user>dog<bot>"),
        ({"messages": turns}, "<user>dog<bot>"),
    ):
        read = read_prompts(written(tmp_path / "p.jsonl", row, row), tokenizer, 9, 4)
        assert [tokenizer.decode(prompt.ids) for prompt in read] == [text, text]
        assert read[1].place.endswith("p.jsonl:2")
    long = {"text": "the quick brown fox jumps over"}
    read = read_prompts(written(tmp_path / "p.jsonl", long, {"text": " "}, long), tokenizer, 9, 4)
    assert [len(prompt.ids) for prompt in read] == [4, 4]
    assert "1 rows without a prompt, the first: " in capsys.readouterr().err


def test_tokenizers_that_differ_are_named(folders, tmp_path, capsys):
    other = weighted(tiny_folder(tmp_path / "other", text="zebra crossing on the quay"))
    prompts = written(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"})
    assert speculate(folders[0], other, prompts) == 2
    said = capsys.readouterr().err
    assert "target and draft do not share a tokenizer" in said
    assert "for the draft" in said
    assert "student" not in said


def test_a_draft_whose_head_lacks_tokens_of_the_target_is_refused(folders, tmp_path, capsys):
    small = weighted(tiny_folder(tmp_path / "small"), vocab_size=268)
    prompts = written(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"})
    assert speculate(folders[0], small, prompts) == 2
    assert "the draft's head has 268 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a"}], "1 of them, expected at least 2"),
        ([{"question": "a"}, {"question": "b"}], "expected a column `prompt`, `messages` or `text`"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "need a chat template"),
        ([{"prompt": "dog " * 300}, {"prompt": "fox"}], "do not fit the target's 128 positions"),
    ],
)
def test_prompts_that_cannot_be_used_are_said_in_words(folders, tmp_path, capsys, rows, words):
    assert speculate(*folders, written(tmp_path / "p.jsonl", *rows)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--temperature", "-1"], "temperature: -1.0, expected 0"),
        (["--device", "cuda:77"], "--device cuda:77: "),
    ],
)
def test_options_out_of_range_are_said_in_words(folders, tmp_path, capsys, more, words):
    prompts = written(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"})
    assert speculate(*folders, prompts, *more) == 2
    assert words in capsys.readouterr().err
