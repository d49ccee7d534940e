"""What `kdlm check` says of an environment, by its key."""

from pathlib import Path

import pytest

from kdlm.check import check
from kdlm.recipe import load

RECIPE = Path(__file__).parents[2] / "recipes/sandbox/tools/on_policy.yaml"
MODEL = "{name: sandbox, model: code-student}"


def checked(*changes: str) -> list[str]:
    return check(load(RECIPE, [f"teacher={MODEL}", f"student={MODEL}", *changes]))


def test_an_environment_has_a_line() -> None:
    assert "rollouts.environment: tools, at most 8 turns" in checked()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["rollouts.environment={name: retry}"], r"^rollouts\.environment: retry asks the recipe's verifier"),
        (["verifier={name: exact}"], r"^rollouts\.environment: it reads the column 'task' and the verifier 'answer'"),
        (
            ["rollouts.environment={name: custom, target: 'nowhere:X'}"],
            r"^rollouts\.environment\.target: cannot import 'nowhere:X'",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key(changes: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked(*changes)


def test_a_verifier_that_reads_the_same_column_or_none_may_stand_beside_it() -> None:
    for column in ("task", "null"):
        assert checked(f"verifier={{name: exact, column: {column}}}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["method={name: grpo, teacher_kl: 0}", "rollouts={}"], r"^rollouts: the student's own text cannot be made of"),
        (["method={name: grpo, teacher_kl: 0}"], r"data: \S+ does not provide rollouts, which grpo needs"),
    ],
)
def test_images_have_no_text_to_go_on_from(changes: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(load(RECIPE.parents[2] / "diffusion/ring_sds.yaml", changes))


WALKS = RECIPE.parents[1] / "pi_distill.yaml"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["rollouts.informed=false"], r"rollouts\.informed: pi_distill learns from a student that is told more"),
        (["rollouts.sampling.samples_per_prompt=1"], r"rollouts\.sampling\.samples_per_prompt: rewards are compared"),
        (["method={name: policy_gradient}", "data.context=null"], r"rollouts\.informed: prompts hold a context only"),
        (["method={name: rltf_sd}", "rollouts.informed=false"], r"rollouts\.environment: missing; rltf_sd learns"),
    ],
)
def test_what_rewards_and_informed_students_lack_is_named_with_its_key(changes: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(load(WALKS, changes))
