"""`kdlm pack` and `kdlm merge`: folders to a folder, and what is wrong with them in words."""

import pytest
from packed_models import a_pair, distance, left_in
from transformers import AutoModelForCausalLM

from kdlm import cli


@pytest.fixture
def root(tmp_path, monkeypatch):
    a_pair(tmp_path, shards="12KB")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_pack_is_made_and_merged_from_the_command_line(root, capsys):
    assert cli.main(["pack", "base", "tuned", "-o", "pack", "--share", "0.25", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "changed, 0 copies of them, 0 unchanged" in said
    assert "kdlm merge base pack --output FOLDER" in said
    assert cli.main(["merge", "base", "pack", "tuned", "--weights", "0.5,0.5", "-o", "out"]) == 0
    assert "plus 0.5 times pack" in capsys.readouterr().out
    assert distance(root / "out", root / "tuned") < distance(root / "base", root / "tuned") / 4
    AutoModelForCausalLM.from_pretrained(root / "out")


def test_tuning_is_moved_from_the_command_line(root):
    assert cli.main(["merge", "tuned", "tuned", "--minus", "base", "-o", "moved"]) == 0
    assert cli.main(["merge", "moved", "base", "--minus", "tuned", "-o", "back"]) == 0
    assert distance(root / "back", root / "tuned") <= 1e-6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pack", "base", "base", "-o", "p"], "base does not differ from base"),
        (["pack", "base", "none", "-o", "p"], "none: there is no such folder"),
        (["pack", "base", "tuned", "-o", "base"], "base: there already"),
        (["pack", "base", "tuned", "-o", "p", "--share", "0.001"], "raise --share"),
        (["merge", "base", "tuned", "--weights", "1,2", "-o", "p"], "--weights: 2 for 1"),
        (["merge", "base", "sandbox:no", "-o", "p"], "the sandbox has no model 'no'"),
    ],
)
def test_wrong_input_is_one_line_and_exits_2(root, capsys, words, said):
    assert cli.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert said in lines[0]
    assert left_in(root) == ["base", "tuned"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pack", "base", "tuned"], "required: -o/--output"),
        (["pack", "base", "tuned", "-o", "p", "--share", "2"], "expected a number above 0, at most 1, got '2'"),
        (["pack", "base", "tuned", "-o", "p", "--rank", "0"], "expected a whole number from 1"),
        (["pack", "base", "tuned", "-o", "p", "--rank", "2", "--share", "0.1"], "not allowed with argument"),
        (["merge", "base", "-o", "p"], "required: part"),
        (["merge", "base", "p", "-o", "p", "--weights", "a"], "expected numbers with commas"),
    ],
)
def test_a_wrong_command_line_of_packs_is_said_in_words(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
