"""Every way in gives the same rows, and every wrong way one error that names the place."""

import csv
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from kdlm.data import Source
from kdlm.data.sources import open_source

ROWS = [{"prompt": f"what is {i}?", "completion": f'the "answer",\n {i}'} for i in range(5)]


def write(folder: Path, kind: str) -> str:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS))  # blank lines are no rows
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ROWS[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "folder":
        path.mkdir()
        write(path, "jsonl")
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    elif kind == "saved_splits":
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(path))
    elif kind == "glob":
        for i, row in enumerate(ROWS):
            (folder / f"part-{i}.jsonl").write_text(json.dumps(row))
        return str(folder / "part-*.jsonl")
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "tsv", "folder", "saved", "saved_splits", "glob"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    opened = open_source(Source(path=write(tmp_path, kind)))
    assert sorted(opened.columns) == ["completion", "prompt"]
    assert [row for _, row in opened.read(["prompt", "completion"])] == ROWS


@pytest.mark.parametrize(
    ("sample_by", "texts"),
    [
        ("line", ["one", "two", "  three"]),
        ("paragraph", ["one\ntwo", "  three"]),
        ("document", ["one\ntwo\n\n\n  three\n"]),
    ],
)
def test_text_is_read_by_line_paragraph_or_document(tmp_path, sample_by, texts):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\n  three\n")
    opened = open_source(Source(path=str(tmp_path / "a.txt"), sample_by=sample_by))
    assert [row["text"] for _, row in opened.read(["text"])] == texts


def test_places_are_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    path = str(tmp_path / "a.txt")
    assert [place for place, _ in open_source(Source(path=path)).read([])] == [f"{path}:1", f"{path}:3"]


def test_a_folder_has_splits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    rows = [row for _, row in open_source(Source(path=str(tmp_path), split="test")).read(["text"])]
    assert rows == [{"text": "test"}]


def test_a_hub_id_goes_to_load_dataset(monkeypatch):
    calls = []

    def load_dataset(path, name=None, **options):
        calls.append((path, name, options))
        rows = datasets.Dataset.from_list(ROWS)
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(path="owner/rows", subset="small", split="validation", revision="v2")
    for stream in (False, True):
        opened = open_source(source, stream=stream)
        assert [row for _, row in opened.read(["prompt", "completion"])] == ROWS
        assert opened.digest(True) == opened.digest(True)
        assert calls[-1] == ("owner/rows", "small", {"split": "validation", "revision": "v2", "streaming": stream})


BROKEN = {
    "a.jsonl": ('{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not valid JSON at column 13: Expecting ',' delimiter"),
    "b.jsonl": ('{"text": "a"}\n[1]\n', r"b\.jsonl:2: a row is a JSON object .* not list"),
    "c.json": ('[{"text": "a"},\n {"text" "b"}]', r"c\.json:2: not valid JSON at column 10"),
    "d.json": ('{"text": "a"}\n{"text": "b"}', r"d\.json:2: .*Extra data; one object per line is `format: jsonl`"),
    "e.json": ('{"text": "a"}', r"e\.json:1: .* is a list of objects, not dict"),
    "f.csv": ("text\na\nb,c\n", r"f\.csv:3: more fields than the header"),
    "g.csv": ('text\na\n"b" c\n', r"g\.csv:3: not valid CSV"),
    "h.parquet": ("not parquet", r"h\.parquet: not a parquet file"),
    "i.jsonl": ("\n", r"i\.jsonl': no rows"),
    "j.json": ("", r"j\.json': no rows"),
    "k.doc": ("a", r"unknown format '\.doc': rename it to one of \.csv,"),
    "l.txt": (b"\xff\xfe", r"l\.txt: not UTF-8 text"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(open_source(Source(path=str(tmp_path / name))).read([]))


def test_a_broken_line_in_a_folder_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"train\.jsonl:2: not valid JSON"):
        open_source(Source(path=str(tmp_path)))


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=r"no such file or folder, did you mean '.*train\.jsonl'"):
        open_source(Source(path=str(tmp_path / "trian.jsonl")))
    with pytest.raises(ValueError, match=r"'nobody/nothing', split 'test': neither a file or folder here, nor"):
        open_source(Source(path="nobody/nothing", split="test"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty"):
        open_source(Source(path=str(empty)))
    with pytest.raises(ValueError, match=r"split 'valid'"):
        open_source(Source(path=str(tmp_path), split="valid"))


def test_options_that_mean_nothing_are_refused(tmp_path):
    path = write(tmp_path, "jsonl")
    for options in ({"split": "test"}, {"subset": "x"}, {"revision": "x"}, {"sample_by": "document"}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` means nothing for"):
            open_source(Source(path=path, **options))
    with pytest.raises(ValueError, match="several formats"):
        write(tmp_path, "json")
        open_source(Source(path=str(tmp_path / "rows.*")))


def test_the_digest_follows_the_content(tmp_path):
    path = Path(write(tmp_path, "jsonl"))
    before = open_source(Source(path=str(path))).digest(True)
    assert open_source(Source(path=str(path))).digest(True) == before
    path.write_text(path.read_text().replace("what is 3", "what is 4"))
    assert open_source(Source(path=str(path))).digest(True) != before
