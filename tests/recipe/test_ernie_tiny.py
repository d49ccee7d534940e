"""ERNIE-Tiny's four recipes are the paper's stages: whose inside, on which text, and labels in the last stage alone."""

from pathlib import Path

import pytest

from kdlm import stages
from kdlm.recipe import load

FOLDER = Path(__file__).parents[2] / "recipes" / "sandbox" / "ernie_tiny"
STAGES = {
    "general": ("pretrained", "text", []),
    "general_enhanced": ("finetuned", "text", []),
    "task_adaptive": ("finetuned", "text_classes", []),
    "task_specific": ("finetuned", "text_classes", ["forward_kl", "cross_entropy"]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_its_teacher_its_text_and_its_losses(stage: str) -> None:
    recipe = load(FOLDER / f"{stage}.yaml")
    teacher, data, losses = STAGES[stage]
    assert recipe.teacher is not None and recipe.teacher.name == (
        "masked_lm" if teacher == "pretrained" else "text_classifier"
    )
    assert recipe.data.name == data
    assert [loss.name for loss in recipe.losses] == losses
    method = recipe.method.build(recipe.losses, None)
    assert recipe.method.name == "tinybert" and method.needs == {"teacher.layers"} and "projectors" in method.roles


def test_the_student_and_its_maps_go_on_from_stage_to_stage_and_one_may_be_skipped() -> None:
    run = stages.load(FOLDER / "stages.yaml")
    names = [name.replace("_", "-") for name in STAGES]
    assert [stage.name for stage in run.stages] == ["finetuned", *names]
    for before, stage in zip(names, run.stages[2:], strict=False):
        assert stage.before == before and stage.carry == ("projectors",)
    skipped = stages.load(FOLDER / "stages.yaml", ["task-adaptive.skip=true"])
    last = skipped.by_name["task-specific"]
    assert [stage.name for stage in skipped.active] == ["finetuned", "general", "general-enhanced", "task-specific"]
    assert last.before == "general-enhanced"
