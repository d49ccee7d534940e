"""Every error of a recipe at once, each with its place, what was expected and what was meant."""

import textwrap
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, model_validator

from kdlm.section import Custom, Section
from kdlm.section_loader import load_section
from kdlm.yaml_document import RecipeError


class Constant(Section):
    name: Literal["constant"] = "constant"
    value: float = 1.0


class Linear(Section):
    name: Literal["linear"] = "linear"
    start: float
    end: float = 0.0


class ForwardKL(Section):
    name: Literal["forward_kl"] = "forward_kl"
    temperature: float = Field(1.0, gt=0)
    weight: float | Annotated[Constant | Linear, Field(discriminator="name")] = 1.0


class CrossEntropy(Section):
    name: Literal["cross_entropy"] = "cross_entropy"


class Run(Section):
    losses: list[Annotated[ForwardKL | CrossEntropy | Custom, Field(discriminator="name")]]
    mode: Literal["fast", "slow"] = "fast"
    steps: int = 1
    shuffle: bool = False
    columns: dict[str, int] = {}
    layers: dict[int, int] = {}
    models: dict[str, Annotated[Constant | Linear, Field(discriminator="name")]] = {}
    files: str | list[str] = "x"
    note: str | None = None
    inner: Constant = Constant()

    @model_validator(mode="after")
    def _not_seven(self) -> Self:
        if self.steps == 7:
            raise ValueError("steps: seven brings bad luck; take 8")
        return self


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def of(text: str, *overrides: str) -> list[str]:
        Path("r.yaml").write_text(textwrap.dedent(text))
        with pytest.raises(RecipeError) as caught:
            load_section(Run, "r.yaml", overrides)
        return str(caught.value).splitlines()

    return of


@pytest.fixture
def load(tmp_path: Path):
    def loaded(text: str, *overrides: str) -> Run:
        path = tmp_path / "r.yaml"
        path.write_text(textwrap.dedent(text))
        return load_section(Run, path, overrides)

    return loaded


def test_a_good_file_becomes_the_section(load):
    run = load("losses:\n  - {name: forward_kl, weight: {name: linear, start: 1e-3}}\nlayers: {0: 3}\nshuffle: true")
    assert run == Run(losses=[ForwardKL(weight=Linear(start=1e-3))], layers={0: 3}, shuffle=True)


@pytest.mark.parametrize(
    ("yaml", "line"),
    [
        (
            "losses: [{name: forward_kl, temprature: 2}]",
            "r.yaml:1: losses.0.temprature: unknown key, did you mean temperature?",
        ),
        ("losses: []\nlosess: []", "r.yaml:2: losess: unknown key, did you mean losses?"),
        ("losses: []\ninner: {q: 1}", "r.yaml:2: inner.q: unknown key; known here: name, value"),
        (
            "losses:\n  - {name: cross_entropy}\n  - {name: foward_kl}",
            "r.yaml:3: losses.1.name: unknown loss 'foward_kl', did you mean forward_kl? "
            "One of: forward_kl, cross_entropy, custom",
        ),
        (
            "losses: [{name: zzz}]",
            "r.yaml:1: losses.0.name: unknown loss 'zzz'. One of: forward_kl, cross_entropy, custom",
        ),
        (
            "losses: [{temperature: 1}]",
            "r.yaml:1: losses.0: `name` is missing. One of: cross_entropy, custom, forward_kl",
        ),
        ("losses: [forward_kl]", "r.yaml:1: losses.0: expected a mapping, got 'forward_kl'"),
        ("losses: {name: forward_kl}", "r.yaml:1: losses: expected a list, got a mapping"),
        ("losses:", "r.yaml:1: losses: expected a list, got nothing"),
        ("steps: 2", "r.yaml:1: losses: missing"),
        ("losses:\n  - name: forward_kl\n    weight:\n      name: linear", "r.yaml:3: losses.0.weight.start: missing"),
        (
            "losses: [{name: forward_kl, temperature: 0}]",
            "r.yaml:1: losses.0.temperature: must be greater than 0, got 0",
        ),
        (
            "losses: [{name: forward_kl, weight: high}]",
            "r.yaml:1: losses.0.weight: expected a number or a mapping, got 'high'",
        ),
        (
            "losses: [{name: forward_kl, weight: {name: liner}}]",
            "r.yaml:1: losses.0.weight.name: unknown weight 'liner', did you mean linear? One of: constant, linear",
        ),
        (
            "losses: []\nmodels: {mine: {name: liner}}",
            "r.yaml:2: models.mine.name: unknown model 'liner', did you mean linear? One of: constant, linear",
        ),
        ("losses: []\nmode: fsat", "r.yaml:2: mode: expected 'fast' or 'slow' (did you mean fast?), got 'fsat'"),
        ("losses: []\nsteps: 1.5", "r.yaml:2: steps: expected a whole number, got 1.5"),
        ("losses: []\nsteps: many", "r.yaml:2: steps: expected a whole number, got 'many'"),
        ("losses: []\nshuffle: perhaps", "r.yaml:2: shuffle: expected true or false, got 'perhaps'"),
        ("losses: []\nnote: 1e-3", "r.yaml:2: note: expected text, got 0.001 (quote it to make it text)"),
        ("losses: []\ncolumns:\n  a: 1\n  b: x", "r.yaml:4: columns.b: expected a whole number, got 'x'"),
        ("losses: []\nfiles: {a: b}", "r.yaml:2: files: expected text or a list, got a mapping"),
        ("losses: []\nfiles: [a, [b]]", "r.yaml:2: files.1: expected text, got a list"),
        ("losses: []\nsteps: 7", "r.yaml:1: steps: seven brings bad luck; take 8"),
        ("losses: []\nsteps: 2\nsteps: 3", "r.yaml:3: steps: duplicate key, first set on line 2"),
        (
            "losses: []\ninner: &x {value: *x}",
            "r.yaml:2: inner.value: cyclic alias: the value contains itself; write it out",
        ),
        ("- losses", "r.yaml:1: expected keys and values, got a list"),
        ("losses", "r.yaml:1: expected keys and values, got 'losses'"),
    ],
)
def test_one_mistake_is_one_line(problems, yaml, line):
    assert problems(yaml) == [line]


def test_a_custom_target_says_what_it_looks_like(problems):
    (line,) = problems("losses: [{name: custom, target: mine}]")
    assert line.startswith("r.yaml:1: losses.0.target: must match pattern")


def test_all_mistakes_come_at_once_in_the_order_of_the_file(problems):
    text = """\
        mode: fsat
        losses:
          - {name: forward_kl, temprature: 3}
          - {name: forward_kl, weight: {name: linear, strt: 1}}
        steps: x
        mode: slow
    """
    assert [line.split(" ")[1] for line in problems(text, "steps", "nowhere=1")] == [
        "mode:",
        "losses.0.temprature:",
        "losses.1.weight.start:",
        "losses.1.weight.strt:",
        "steps:",
        "mode:",
        "'steps':",
        "'nowhere=1':",
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("losses.0.temprature=2", "unknown key, did you mean temperature?"),
        ("losses.0.temperature=-2", "must be greater than 0, got -2"),
        ("losses.0.weight={name: linear}", "losses.0.weight.start: missing"),
        (
            "losses.0.name=foward_kl",
            "unknown loss 'foward_kl', did you mean forward_kl? One of: forward_kl, cross_entropy, custom",
        ),
        ("losses.1.temperature=2", "losses has entries 0 to 0, not '1'"),
        ("losses.first.temperature=2", "losses has entries 0 to 0, not 'first'"),
        ("losses.-1.temperature=2", "losses has entries 0 to 0, not '-1'"),
        ("steps.x=2", "steps is 3, which has no 'x' inside"),
        ("stps=2", "unknown key, did you mean steps?"),
        ("steps", "expected key=value with a dotted key, as in training.max_steps=10"),
        ("=3", "expected key=value with a dotted key, as in training.max_steps=10"),
        ("losses..x=3", "expected key=value with a dotted key, as in training.max_steps=10"),
        ("columns.a=x", "expected a whole number, got 'x'"),
        ("note=&x [*x]", "0: cyclic alias: the value contains itself; write it out"),
    ],
)
def test_a_bad_override_is_named_as_it_was_written(problems, override, line):
    assert problems("losses: [{name: forward_kl}]\nsteps: 3", override) == [f"override {override!r}: {line}"]


def test_an_override_that_is_not_yaml_is_named(problems):
    (line,) = problems("losses: []", "steps=[1")
    assert line.startswith("override 'steps=[1': the value is not yaml: ")
    assert "a bracket is not closed" in line


def test_overrides_replace_values_make_mappings_on_the_way_and_the_last_one_wins(load):
    run = load(
        "losses: [{name: forward_kl}, {name: cross_entropy}]\nlayers: {0: 3}",
        "losses.0.temperature=2",
        "losses.0.temperature=3",
        "losses.1={name: forward_kl, weight: 0.5}",
        "columns.a=1",
        "inner.value=1e-3",
        "layers.0=4",
        "note=no",
    )
    assert run == Run(
        losses=[ForwardKL(temperature=3), ForwardKL(weight=0.5)],
        columns={"a": 1},
        inner=Constant(value=1e-3),
        layers={0: 4},
        note="no",
    )


def test_an_override_of_one_alias_leaves_the_other_alone(load):
    run = load("losses: [&x {name: forward_kl}, *x]", "losses.1.temperature=2")
    assert run.losses == [ForwardKL(), ForwardKL(temperature=2)]


def test_an_override_mends_a_mistake_of_the_file(load):
    assert load("losses: []\nsteps: many", "steps=4").steps == 4


def test_a_choice_whose_name_is_also_a_key_is_told_apart(tmp_path: Path):
    class Lora(Section):
        name: Literal["lora"] = "lora"
        lora: Constant = Constant()

    class Other(Section):
        name: Literal["other"] = "other"

    class Root(Section):
        part: Annotated[Lora | Other, Field(discriminator="name")]

    path = tmp_path / "r.yaml"
    path.write_text("part:\n  name: lora\n  lora: {valu: 1}\n")
    with pytest.raises(RecipeError, match=r"3: part\.lora\.valu: unknown key, did you mean value\?"):
        load_section(Root, path)
