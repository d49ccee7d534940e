"""`kdlm schema`: the generated files are those of the code, and say when they are not."""

import json
from pathlib import Path

import pytest

from kdlm import schema

ROOT = Path(__file__).parents[2]
FILES = (schema.KINDS[0].schema, schema.KINDS[0].reference)


@pytest.fixture
def root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "recipes").mkdir()
    assert schema.write(tmp_path) == 0
    capsys.readouterr()
    return tmp_path


def test_the_files_of_this_checkout_are_those_of_its_code(capsys):
    assert schema.write(ROOT, check=True) == 0, capsys.readouterr().out


def test_writing_twice_changes_nothing(root, capsys):
    before = (root / FILES[0]).read_text()
    assert schema.write(root, check=True) == 0
    schema.write(root)
    assert (root / FILES[0]).read_text() == before
    assert capsys.readouterr().out.count("unchanged") == 2 * len(schema.KINDS)


@pytest.mark.parametrize("path", FILES)
def test_check_exits_1_and_names_the_file_that_is_out_of_date(root, capsys, path):
    text = (root / path).read_text()
    (root / path).write_text(text.replace("run_dir", "rundir"))
    assert schema.write(root, check=True) == 1
    assert capsys.readouterr().out == f"{root / path}: out of date, run kdlm schema\n"
    (root / path).unlink()
    assert schema.write(root, check=True) == 1


def test_another_transformers_changes_training_only(root, monkeypatch):
    for path in FILES:
        text = (root / path).read_text()
        text = text.replace(f"transformers {schema.transformers.__version__}", "transformers 0.0.1")
        (root / path).write_text(text.replace("adam_epsilon", "adam_eps"))
    assert schema.write(root, check=True) == 0
    (root / FILES[1]).write_text((root / FILES[1]).read_text().replace("temperature", "warmth"))
    assert schema.write(root, check=True) == 1


def test_without_a_recipes_folder_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="--root"):
        schema.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_editor_is_told_that_a_choice_needs_its_name():
    made = json.loads(schema.json_schema())
    assert made["$defs"]["ForwardKL"]["required"][0] == "name"
    assert made["additionalProperties"] is False


@pytest.mark.parametrize("kind", schema.KINDS, ids=lambda kind: kind.section.__name__)
def test_the_reference_has_every_key_of_every_section_and_says_what_it_does(kind):
    text, made = schema.reference(kind), kind.section.model_json_schema()
    for section in (made, *made["$defs"].values()):
        for key, node in section.get("properties", {}).items():
            assert key == "name" or f"| `{key}` |" in text, key
            assert key == "name" or node.get("description"), key


@pytest.mark.parametrize("kind", schema.KINDS, ids=lambda kind: kind.section.__name__)
def test_every_link_of_the_reference_leads_somewhere(kind):
    import re

    text = schema.reference(kind)
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= set(re.findall(r'<a id="([^"]+)">', text))
