"""What `kdlm check` says of a sampler, before anything is loaded."""

from pathlib import Path

import pytest

from kdlm.check import check
from kdlm.recipe import load
from kdlm.samplers.looks import looked_at

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ddk", "sampler: ddk, shares anew every 50 steps"),
        ("rs2", "sampler: repeated, 0.1 of the rows"),
        ("pruned_data", "sampler: fixed, 0.5 of the rows"),
    ],
)
def test_a_sampler_is_said(name: str, said: str) -> None:
    assert said in check(load(f"recipes/sandbox/{name}.yaml"))


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("ddk", "data.packing=pack", "data.packing: a packed row mixes domains"),
        ("ddk", "training.max_steps=-1", "training.max_steps: missing; with ddk"),
        ("ddk", 'data.train=[{path: "sandbox:code/train"}]', "data.train: ddk weighs several domains"),
        ("ddk", "teacher=", "sampler: ddk takes a teacher"),
        ("rs2", "data={train: [{path: a.jsonl}], streaming: true}", "sampler: a stream has no rows to choose from"),
        ("pruned_data", "losses=[{name: forward_kl}]", "sampler.tie: .* give one of each"),
        (
            "pruned_data",
            "sampler={name: fixed, fraction: 0.5, by: score}",
            "sampler.by: sandbox:code/train has no score",
        ),
        ("pruned_data", "data.packing=pack", "data.packing: a packed row has several"),
        ("dp_opd", "sampler={name: repeated, fraction: 0.5}", "sampler: DP-SGD draws rows by chance"),
        ("grpo", "sampler={name: repeated, fraction: 0.5}", "sampler: grpo draws its prompts as TRL does"),
        ("alm", "sampler={name: ddk}", "sampler: ddk .* a teacher with the student's tokenizer"),
        ("masked_kd", "sampler={name: ddk}", "sampler: ddk compares perplexities"),
    ],
)
def test_what_a_sampler_cannot_work_with_is_named(name: str, override: str, said: str) -> None:
    recipe = load(f"recipes/sandbox/{name}.yaml", [override])
    method = recipe.method.build(recipe.losses, None)
    with pytest.raises(ValueError, match=said):
        list(looked_at(recipe, method))


def test_weights_of_sources_are_refused_beside_shares_that_move() -> None:
    weights = [f"data.train.{place}.weight=1" for place in range(3)]
    recipe = load("recipes/sandbox/ddk.yaml", weights)
    with pytest.raises(ValueError, match=r"data\.train\.2\.weight: ddk sets the shares"):
        list(looked_at(recipe, recipe.method.build(recipe.losses, None)))
