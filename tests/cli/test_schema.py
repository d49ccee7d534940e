"""`kdlm schema`: the generated files are those of the code, and say when they are not."""

import json
from pathlib import Path

import pytest

from kdlm import schema
from kdlm.recipe import Recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "recipes").mkdir()
    assert schema.write(tmp_path) == 0
    capsys.readouterr()
    return tmp_path


def test_the_files_of_this_checkout_are_those_of_its_code(capsys):
    assert schema.write(ROOT, check=True) == 0, capsys.readouterr().out


def test_writing_twice_changes_nothing(root, capsys):
    before = (root / schema.SCHEMA).read_text()
    assert schema.write(root, check=True) == 0
    schema.write(root)
    assert (root / schema.SCHEMA).read_text() == before
    assert capsys.readouterr().out.count("unchanged") == 2


@pytest.mark.parametrize("path", [schema.SCHEMA, schema.REFERENCE])
def test_check_exits_1_and_names_the_file_that_is_out_of_date(root, capsys, path):
    text = (root / path).read_text()
    (root / path).write_text(text.replace("run_dir", "rundir"))
    assert schema.write(root, check=True) == 1
    assert capsys.readouterr().out == f"{root / path}: out of date, run kdlm schema\n"
    (root / path).unlink()
    assert schema.write(root, check=True) == 1


def test_another_transformers_changes_training_only(root, monkeypatch):
    for path in (schema.SCHEMA, schema.REFERENCE):
        text = (root / path).read_text()
        text = text.replace(f"transformers {schema.transformers.__version__}", "transformers 0.0.1")
        (root / path).write_text(text.replace("adam_epsilon", "adam_eps"))
    assert schema.write(root, check=True) == 0
    (root / schema.REFERENCE).write_text((root / schema.REFERENCE).read_text().replace("temperature", "warmth"))
    assert schema.write(root, check=True) == 1


def test_without_a_recipes_folder_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="--root"):
        schema.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_editor_is_told_that_a_choice_needs_its_name():
    made = json.loads(schema.json_schema())
    assert made["$defs"]["ForwardKL"]["required"][0] == "name"
    assert made["additionalProperties"] is False


def test_the_reference_has_every_key_of_every_section():
    text = schema.reference()
    made = Recipe.model_json_schema()
    for section in (made, *made["$defs"].values()):
        for key in section.get("properties", {}):
            assert key == "name" or f"| `{key}` |" in text, key


def test_every_key_is_described():
    made = Recipe.model_json_schema()
    bare = [
        f"{name}.{key}"
        for name, section in {"Recipe": made, **made["$defs"]}.items()
        for key, node in section.get("properties", {}).items()
        if key != "name" and not node.get("description")
    ]
    assert bare == []


def test_every_link_of_the_reference_leads_somewhere():
    import re

    text = schema.reference()
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= set(re.findall(r'<a id="([^"]+)">', text))
