"""Memory: what was kept is there after a kill; a torn line is cut, a damaged one named; a full disk loses nothing."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from kdlm.curation.memory import LINES, Memory


def kept(folder: Path, count: int = 3) -> bytes:
    memory = Memory(folder, {"of": "tests"})
    memory.add({f"key-{n}": {"text": f"text ü {n}\n" * n} for n in range(count)})
    memory.close()
    return (folder / LINES).read_bytes()


def read(folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    memory = Memory(folder, {}, lambda key, value: seen.update({key: value}))
    assert {key: memory[key] for key in seen} == seen
    memory.close()
    return {key: value["text"] for key, value in seen.items()}


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    kept(tmp_path)
    assert read(tmp_path) == {f"key-{n}": f"text ü {n}\n" * n for n in range(3)}


def test_without_a_folder_it_lives_as_long_as_the_object() -> None:
    memory = Memory(None, {})
    memory.add({"a": {"text": "b"}})
    assert memory["a"]["text"] == "b"
    assert "b" not in memory
    memory.close()


def test_a_file_broken_off_anywhere_gives_all_whole_lines_and_takes_more(tmp_path: Path) -> None:
    content = kept(tmp_path)
    for size in range(0, len(content) + 1, 5):
        (tmp_path / LINES).write_bytes(content[:size])
        whole = content[:size].count(b"\n")
        memory = Memory(tmp_path, {})
        assert len(memory) == whole
        memory.add({"new": {"text": "n"}})
        memory.close()
        assert read(tmp_path) == {**{f"key-{n}": f"text ü {n}\n" * n for n in range(whole)}, "new": "n"}


@pytest.mark.parametrize("damage", [b"\0" * 9, b"{}", b"[1]", b'{"key": "a", "te'])
def test_a_damaged_line_is_named_with_the_command_that_mends_it(tmp_path: Path, damage: bytes) -> None:
    first, second, rest = kept(tmp_path).split(b"\n", 2)
    (tmp_path / LINES).write_bytes(b"\n".join([first, damage, second, rest]))
    with pytest.raises(ValueError, match=rf"{LINES}:2: a damaged line .*sed -i 2d "):
        Memory(tmp_path, {})
    os.system(f"sed -i 2d {tmp_path / LINES}")
    assert len(read(tmp_path)) == 3


def test_a_full_disk_leaves_whole_lines_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, write = Memory(tmp_path, {}), os.pwrite
    memory.add({"a": {"text": "kept"}})

    def full(descriptor: int, content: bytes, place: int) -> int:
        if len(content) < 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:20], place)  # a part of it still fits

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=r"No space left on device: .* 1 lines, is kept: .*free space") as error:
            memory.add({"b": {"text": "x" * 10}})
        assert error.value.errno == errno.ENOSPC
    assert "b" not in memory
    memory.add({"c": {"text": "after"}})
    memory.close()
    assert read(tmp_path) == {"a": "kept", "c": "after"}


def test_half_a_character_is_written_as_something_that_can_be_read(tmp_path: Path) -> None:
    memory = Memory(tmp_path, {})
    memory.add({"a": {"text": "\ud83d!"}})
    memory.close()
    assert read(tmp_path) == {"a": "?!"}
