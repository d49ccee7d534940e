"""The command line: what it prints, where, and with which exit code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdlm
from kdlm import cli


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kdlm", *args], capture_output=True, text=True, cwd=cwd, timeout=120)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_help_lists_every_verb():
    done = run("--help")
    assert done.returncode == 0
    for verb in cli.VERBS:
        assert re.search(rf"^    {verb}\s", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("module", ["kdlm", "kdlm.cli"])
def test_importing_the_command_line_imports_nothing_heavy(module):
    heavy = "('torch', 'transformers', 'datasets', 'pydantic', 'numpy', 'rich', 'yaml')"
    assert python(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_public_names_are_fetched_when_asked_for():
    import kdlm.recipe
    import kdlm.trainer

    assert kdlm.load_recipe is kdlm.recipe.load
    assert kdlm.DistillTrainer is kdlm.trainer.DistillTrainer
    assert set(kdlm.__all__) == set(dir(kdlm))
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        kdlm.distill  # noqa: B018


def test_version_is_that_of_the_package():
    assert run("--version").stdout.strip() == f"kdlm {kdlm.__version__}"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "required: verb"),
        (["trian", "r.yaml"], "no verb 'trian', did you mean train?"),
        (["bake"], "no verb 'bake'. Verbs: train, check,"),
        (["train"], "required: recipe"),
        (["check", "r.yaml", "--quick"], "check does not take --quick"),
        (["doctor", "now"], "doctor does not take now"),
        (["serve", "--model", "m", "--port", "70000"], "--port: expected a whole number from 0 to 65535, got '70000'"),
        (["serve", "--model", "m", "--max-queue", "0"], "--max-queue: expected a whole number from 1 to"),
        (["speculate", "--target", "a"], "required: --draft, --prompts"),
        (["speculate", "--limit", "1"], "--limit: expected a whole number from 2 to"),
        (["audit", "rows.jsonl"], "required: --reference"),
        (["audit", "a", "--reference", "b", "--level", "2"], "--level: expected a number above 0, at most 1, got '2'"),
        (["init", "--teacher", "a"], "required: --student, --data"),
    ],
)
def test_a_wrong_command_line_is_said_in_words_and_exits_2(args, words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "resume", "overrides"),
    [
        (["train", "r.yaml"], False, []),
        (["train", "r.yaml", "a.b=1", "c=2"], False, ["a.b=1", "c=2"]),
        (["train", "r.yaml", "--resume"], True, []),
        (["train", "r.yaml", "--resume", "runs/x/checkpoint-5", "a=1"], "runs/x/checkpoint-5", ["a=1"]),
        (["train", "r.yaml", "a=1", "--resume", "b=2", "c=3"], True, ["b=2", "a=1", "c=3"]),
        (["train", "--resume", "--debug", "r.yaml", "a=1"], True, ["a=1"]),
        (["train", "r.yaml", "training.learning_rate=-1"], False, ["training.learning_rate=-1"]),
        (["train", "r.yaml", "typo"], False, ["typo"]),
    ],
)
def test_overrides_may_stand_anywhere_after_the_recipe(args, resume, overrides):
    parsed = cli.parse(args)
    assert (parsed.recipe, parsed.resume, parsed.overrides) == ("r.yaml", resume, overrides)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Make `kdlm methods` raise what a test wants."""
    import kdlm.catalogue

    def fail_with(error: BaseException) -> None:
        def show() -> None:
            raise error

        monkeypatch.setattr(kdlm.catalogue, "show", show)

    return fail_with


@pytest.mark.parametrize("error", [ValueError("too small"), OSError("too small"), ImportError("too small")])
def test_an_error_of_the_user_is_one_line_and_exit_2(failing, capsys, error):
    failing(error)
    assert cli.main(["methods"]) == 2
    assert capsys.readouterr().err.splitlines() == ["kdlm: error: too small", "kdlm: --debug shows where"]


def test_an_error_of_ours_keeps_its_traceback(failing):
    failing(RuntimeError("bug"))
    with pytest.raises(RuntimeError):
        cli.main(["methods"])


def test_debug_shows_where(failing, monkeypatch):
    failing(ValueError("too small"))
    with pytest.raises(ValueError, match="too small"):
        cli.main(["methods", "--debug"])
    monkeypatch.setenv("KDLM_DEBUG", "1")
    with pytest.raises(ValueError, match="too small"):
        cli.main(["methods"])


def test_an_interrupt_exits_130(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main(["methods"]) == 130
    assert capsys.readouterr().err == "kdlm: interrupted\n"


def test_the_process_ends_with_2_and_without_a_traceback(tmp_path):
    done = run("train", "none.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "none.yaml: cannot read the recipe: No such file or directory\n"
    assert list(tmp_path.iterdir()) == []
