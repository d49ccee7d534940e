"""A table in the cache is whole, is built once, and belongs to what it was made from."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forks import CONTEXT

from kdlm.data.cache import SEQUENCES, cached_table, tokenizer_fingerprint
from kdlm.disk import cache_folder

ROWS = [{"input_ids": [i, i + 1], "labels": [-100, i + 1], "length": 2, "key": i} for i in range(2500)]


class Rows:
    """An iterator that tells whether it was used."""

    def __init__(self, rows=ROWS):
        self.rows, self.used = iter(rows), False

    def __iter__(self):
        return self

    def __next__(self):
        self.used = True
        return next(self.rows)


def folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir())


def test_a_table_is_built_once_and_read_back(tmp_path):
    for again in (False, True):
        rows = Rows()
        table, about = cached_table(tmp_path, "name", SEQUENCES, rows, lambda: {"note": 3})
        assert list(table) == ROWS and about["note"] == 3
        assert rows.used != again
    assert folders(tmp_path) == ["name"]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def failing():
        yield from ROWS
        raise ValueError("row 2501")

    with pytest.raises(ValueError, match="row 2501"):
        cached_table(tmp_path, "name", SEQUENCES, failing(), dict)
    assert folders(tmp_path) == []


@pytest.mark.parametrize("file", ["data.arrow", "about.json"])
def test_a_damaged_table_is_built_again(tmp_path, file):
    cached_table(tmp_path, "name", SEQUENCES, Rows(), dict)
    damaged = tmp_path / "name" / file
    damaged.write_bytes(damaged.read_bytes()[:-9])
    rows = Rows()
    assert list(cached_table(tmp_path, "name", SEQUENCES, rows, dict)[0]) == ROWS
    assert rows.used


def build(root: Path, begin: Any, killed: bool, answers: Any) -> None:
    built = []

    def rows():
        built.append(True)
        for number, row in enumerate(ROWS):
            if killed and number == 2200:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row
        time.sleep(0.5)  # the other builder meets an unfinished table

    begin.wait()
    table, _ = cached_table(root, "name", SEQUENCES, rows(), dict)
    answers.put((len(table), len(built)))


def test_a_killed_build_leaves_no_table_and_two_builders_build_one(tmp_path):
    answers = CONTEXT.Queue()
    begin = CONTEXT.Barrier(1)  # a name of its own: it must live until the process has it
    killed = CONTEXT.Process(target=build, args=(tmp_path, begin, True, answers))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert folders(tmp_path) == ["name.unfinished"]

    begin = CONTEXT.Barrier(2)
    builders = [CONTEXT.Process(target=build, args=(tmp_path, begin, False, answers)) for _ in range(2)]
    for process in builders:
        process.start()
    assert sorted(answers.get(timeout=60) for _ in builders) == [(2500, 0), (2500, 1)]
    for process in builders:
        process.join(60)
    assert folders(tmp_path) == ["name"]


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("KDLM_CACHE", str(tmp_path))
    assert cache_folder("data", None) == tmp_path / "data"
    assert cache_folder("data", str(tmp_path / "own")) == tmp_path / "own" / "data"
    monkeypatch.delenv("KDLM_CACHE")
    assert cache_folder("data", None) == Path.home() / ".cache" / "kdlm" / "data"


def test_a_tokenizer_has_one_fingerprint_until_it_changes(tokenizer, new_tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(new_tokenizer()) == before
    tokenizer(["a", "the fox"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(new_tokenizer(300)) != before
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer_fingerprint(tokenizer) != before


@pytest.fixture
def built(tmp_path, load):
    """Load, and return how many tables that built."""

    def count(*args, **section):
        root = tmp_path / "cache" / "data"
        before = set(folders(root)) if root.is_dir() else set()
        load(*args, **section)
        return len(set(folders(root)) - before)

    return count


def test_only_what_changes_tokens_builds_anew(built, tokenizer, new_tokenizer, jsonl):
    path = jsonl(
        [
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"the {i}"}]}
            for i in range(4)
        ]
    )
    assert built(path, tokenizer) == 1
    assert built(path, tokenizer) == 0
    assert built(path, tokenizer, eval_rows=1, packing="padding_free") == 0
    assert built(path, new_tokenizer(300)) == 1
    assert built(path, tokenizer, max_length=50) == 1
    assert built(path, tokenizer, loss_on="all") == 1
    assert built(path, tokenizer, chat_template="{# other #}" + tokenizer.chat_template) == 1
    assert built({"path": path, "limit": 2}, tokenizer) == 1
    assert built(path, tokenizer, packing="pack") == 1  # the packed rows
    assert built(path, tokenizer, packing="pack") == 0
    tokenizer.chat_template += "{# another #}"
    assert built(path, tokenizer) == 1
    before = os.stat(path)
    Path(path).write_text(Path(path).read_text().replace("the 3", "the 5"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert built(path, tokenizer) == 1


def test_a_report_from_the_cache_is_the_report_of_the_build(load, tokenizer, jsonl, tmp_path):
    path = jsonl([{"text": "the fox"}, {"text": ""}])
    first, second = (load(path, tokenizer).report for _ in range(2))
    assert first == second and "rows.jsonl:2: text is empty" in str(second)
    assert json.loads(json.dumps(second.as_dict())) == second.as_dict()
