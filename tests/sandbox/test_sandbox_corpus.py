import hashlib

import pytest

from kdlm.sandbox import SandboxData, build
from kdlm.sandbox.catalog import CODE
from kdlm.sandbox.corpus import split_documents, stdlib_digest, stdlib_documents
from kdlm.sandbox.jsonl import read_jsonl
from kdlm.sandbox.tasks import LEVELS, Task, verify


def test_the_corpus_is_the_standard_library_without_its_tests():
    paths = [document.path for document in stdlib_documents()]
    assert {"argparse.py", "json/decoder.py"} <= set(paths)
    assert paths == sorted(paths)
    for folder in ("test", "tests", "idle_test", "site-packages"):
        assert not any(folder in path.split("/") for path in paths)
    assert sum(len(document.text) for document in stdlib_documents()) > 5_000_000


def test_no_held_out_file_is_in_what_teacher_or_student_read():
    splits = CODE.split()
    held_out = {document.path for document in splits["eval"]}
    teacher = {document.path for document in splits["teacher"]}
    train = {document.path for document in splits["train"]}
    assert held_out.isdisjoint(teacher)
    assert train < teacher, "the student's data is a small part of the teacher's"
    assert len(held_out) + len(teacher) == len(stdlib_documents())
    texts = {document.text for document in splits["teacher"]}
    assert not any(document.text in texts for document in splits["eval"])


def test_a_file_keeps_its_side_when_another_is_added():
    documents = stdlib_documents()
    sizes = {"train_chars": 300_000, "eval_chars": 200_000}
    before, after = split_documents(documents[1:], **sizes), split_documents(documents, **sizes)
    added = documents[0].path
    moved = {document.path for document in before["eval"]} ^ {document.path for document in after["eval"]}
    assert moved <= {added} | {document.path for document in before["eval"][-1:]}


def test_the_digest_and_the_split_are_the_same_when_the_library_is_read_again():
    digest, splits = stdlib_digest(), CODE.split()
    stdlib_documents.cache_clear()
    stdlib_digest.cache_clear()
    assert stdlib_digest() == digest
    assert CODE.split() == splits


def test_the_files_hold_the_split():
    folder = build("code", progress=None)
    for split, documents in CODE.split().items():
        rows = read_jsonl(folder / f"{split}.jsonl")
        assert [row["path"] for row in rows] == [document.path for document in documents]
        digest = hashlib.sha256("".join(row["text"] for row in rows).encode()).digest()
        assert digest == hashlib.sha256("".join(document.text for document in documents).encode()).digest()


@pytest.mark.parametrize("data", ["arithmetic", "strings"])
def test_task_files_hold_every_level_and_read_back_as_tasks(data):
    for file in ("train", "eval"):
        tasks = [Task(**row) for row in read_jsonl(SandboxData(data=data, file=file).resolve())]
        assert {task.level for task in tasks} == set(LEVELS)
        assert all(verify(task, task.completion) for task in tasks)


def test_a_file_that_a_dataset_lacks_is_refused():
    with pytest.raises(ValueError, match="arithmetic has the files train and eval"):
        SandboxData(data="arithmetic", file="teacher")
    with pytest.raises(ValueError, match="code-written has the files train, not eval"):
        SandboxData(data="code-written", file="eval")
