"""The recipes of the checkout: each is valid without a network, is in the table, and the sandbox ones train."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from loopback import served, source

from kdlm import recipe, stages
from kdlm.capture import capture
from kdlm.check import check
from kdlm.recipe import load
from kdlm.teachers import CachedTeacherSection
from kdlm.train import train

FOLDER = Path(__file__).parents[2] / "recipes"
PIPELINES = FOLDER / "pipelines"  # tests/curation has these
FILES = sorted(
    path for path in FOLDER.rglob("*.yaml") if not path.is_relative_to(PIPELINES) and path.parent.name != "accelerate"
)
STAGED = [path for path in FILES if "\nstages:\n" in path.read_text()]
RECIPES = [path for path in FILES if path not in STAGED]
REWARDED = [
    *("student={name: sandbox, model: code-student-tiny}", "teacher={name: sandbox, model: code-teacher-tiny}"),
    *("rollouts.sampling.max_new_tokens=4", "data.train.0.limit=8", "data.eval.0.limit=2"),
]
STUDENT = "student={name: sandbox, model: code-student-tiny}"
COLUMNS = "columns: {prompt: prompt, chosen: completion, rejected: answer}"
PAIRS = f"data.train.0={{path: 'sandbox:arithmetic/train', limit: 12, {COLUMNS}}}"
TINY = {
    "best_by_agreement": [
        *("training.eval_strategy=steps", "training.eval_steps=1", "training.save_strategy=steps"),
        *("evaluation.rows=4", "evaluation.generations.max_new_tokens=4"),
    ],
    "alm_cached": ["teacher.of.model=code-teacher-tiny", "data.train.0.limit=2"],
    "cached": ["teacher.of.model=code-teacher-tiny", "data.train.0.limit=2"],
    "byte_kd": ["student.model=code-student-tiny-bytes"],
    "dskd": ["student.model=code-student-tiny-bytes"],
    "ensemble": ["teacher.members.0.model=code-teacher-tiny", "teacher.members.1.model=code-student-tiny"],
    "gdsd": ["data.eval.0.limit=2", "rollouts.eval_prompts=2", "training.eval_on_start=false"],
    "dpo": [STUDENT, PAIRS, "data.eval_rows=2"],
    "simpo": [STUDENT, PAIRS, "data.eval_rows=2"],
    "specs": [PAIRS, "data.eval_rows=2"],
    "hidden_kd": ["method.layers=[[0, 1]]"],
    "masked_kd": ["teacher.path=sandbox:masked-tiny"],
    "minilm": ["teacher.path=sandbox:masked-tiny", "method.relation_heads=2"],
    "tinybert": ["teacher.path=sandbox:masked-tiny"],
    "text_classification": ["teacher={name: text_classifier, path: 'sandbox:code-encoder', num_labels: 8}"],
    "padded": ["teacher.model=code-teacher-tiny-padded"],
    "grpo": REWARDED,
    "rlad": REWARDED,
    "sliced": ["teacher.model=code-teacher-tiny"],
    "sparse": ["student.model=code-teacher-tiny"],
    "pruned": [
        "student.source.model=code-teacher-tiny",
        "student.layers=1",
        "student.width={hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_key_value_heads: 2}",
    ],
    "dropped_layers": ["student.source.model=code-teacher-tiny"],
    "self_data_distillation": [
        "student.source.model=code-teacher-tiny",
        "data.train.0={path: 'sandbox:arithmetic/train', limit: 32, columns: {prompt: prompt, completion: completion}}",
    ],
    "replaced": ["student.source.model=code-teacher-tiny"],
    "kd_aif": ["data.train.0={path: 'sandbox:arithmetic/train', columns: {weight: level}}", "data.eval.0.limit=2"],
    "step_by_step": ["data.train.0={path: 'sandbox:arithmetic/train', domain: label}", "data.eval_rows=2"],
    "transfer_bytes": ["student.source.model=code-teacher-tiny", "method.layers=[[1, 0]]"],
    "transfer_unigram": ["student.source.model=code-teacher-tiny"],
}
"""What else has to change where a recipe is run with tiny models."""
PRETRAINED = "student={name: sandbox, model: code-student}"
SUMS = "data.train.0.path=sandbox:arithmetic/train"
WEIGHED = "data.train.0={path: 'sandbox:arithmetic/train', columns: {weight: level}}"
ENCODERS = ["student.path=sandbox:masked-student", "student.num_labels=10"]
ENCODERS += ["teacher.path=sandbox:masked-teacher", "teacher.num_labels=10"]
AFTER = {
    "acm/gates": ["student={name: adaptive, source: {name: sandbox, model: code-teacher}}"],
    "acm/whole": ["student={name: adaptive, source: {name: sandbox, model: code-teacher}}"],
    "draft/align": [PRETRAINED, "data.train.0.path=sandbox:arithmetic/train"],
    "draft/distillspec": [PRETRAINED],
    "chain/student": ["teacher={name: sandbox, model: code-teacher}"],
    "sums/on_policy": ["teacher={name: sandbox, model: code-teacher}", "student={name: sandbox, model: code-student}"],
    "tools/on_policy": ["teacher={name: sandbox, model: code-student}", "student={name: sandbox, model: code-student}"],
    "tools/skill_sd": ["student={name: sandbox, model: code-student}"],
    "sandbox/kd_aif": ["data.train.0={path: 'sandbox:arithmetic/train', columns: {weight: level}}"],
    "sandbox/self_data_distillation": [SUMS],
    "sandbox/step_by_step": ["data.train.0={path: 'sandbox:arithmetic/train', domain: label}"],
    "redi/sft": ["data.train.0={path: 'sandbox:arithmetic/train', columns: {prompt: prompt, completion: completion}}"],
    "redi/redi": [PRETRAINED, PAIRS],
    "sandbox/dpo": [PRETRAINED, PAIRS],
    "sandbox/simpo": [PRETRAINED, PAIRS],
    "sandbox/specs": [PAIRS],
    "paced/forward": [PRETRAINED, "teacher={name: sandbox, model: code-teacher}", WEIGHED],
    "paced/reverse": [PRETRAINED, "teacher={name: sandbox, model: code-teacher}", WEIGHED],
    "metis_rise/sft": [PRETRAINED, "data.train.0.path=sandbox:walks/train", "data.train.1.path=sandbox:walks/train"],
    "dasd/low": [SUMS],
    "dasd/high": [PRETRAINED, SUMS],
    "dasd/mixed": [PRETRAINED, SUMS, "data.train.1.path=sandbox:arithmetic/train"],
    "prompt_synthesis/generator": [SUMS],
    "sandbox/grpo": ["teacher={name: sandbox, model: code-teacher}", PRETRAINED],
    "sandbox/rlad": ["teacher={name: sandbox, model: code-teacher}", PRETRAINED],
    "vision_language/sft": ["student.path=sandbox:digits-vlm-student"],
    "vision_language/finetune": ["student.path=sandbox:digits-vlm-student"],
    "diffusion/digits_instaflow": ["student.path=sandbox:digits-denoiser", "teacher.path=sandbox:digits-denoiser"],
    "sd_zero/distil": ["student={name: sandbox, model: walks-start}"],
    "score/stage2": ["student={name: sandbox, model: walks-start}"],
    "fusion/fuse": ["teacher.members.1={name: sandbox, model: code-teacher-4k}"],
    "further_pretraining/student": ["teacher={name: sandbox, model: code-student}"],
    "demix/run": [PRETRAINED],
    "ernie_tiny/general_enhanced": ENCODERS,
    "ernie_tiny/task_adaptive": ENCODERS,
    "ernie_tiny/task_specific": ENCODERS,
    "sandbox/text_classification": ["teacher.path=sandbox:code-encoder", "teacher.num_labels=8"],
    "minilm_assistant/student": ["teacher={name: sandbox, model: code-teacher}"],
    "generations/next": ["teacher.members.0={name: sandbox, model: code-teacher}"],
}
"""What stands in for the folder that another recipe leaves behind; `tests/train/test_chains.py` runs them in order."""

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_recipe_passes_the_check_without_a_network(path):
    recipe = load(path, AFTER.get(f"{path.parent.name}/{path.stem}", []))
    said = check(recipe)
    assert any(line.startswith("training: ") for line in said)
    on_hub = any(owner in path.read_text() for owner in ("Qwen/", "meta-llama/", "google/"))
    assert on_hub == any("not looked at here" in line and "huggingface.co" in line for line in said)


@pytest.mark.parametrize("path", STAGED, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_stage_of_a_file_passes_the_check_without_a_network(path):
    run = stages.load(path)
    said = stages.check(run)
    assert all(any(line.startswith(f"stage {stage.name}: ") for line in said) for stage in run.stages)
    assert not any("note: " in line for line in said)


def test_every_recipe_has_a_row_in_the_table_and_every_row_a_recipe():
    rows = re.findall(r"^\| \[[^]]+\]\(([^)]+\.yaml)\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    rows = [row for row in rows if not row.startswith("accelerate/")]
    assert sorted(rows) == [str(path.relative_to(FOLDER)) for path in FILES]


def test_every_recipe_says_on_top_what_it_is_for_and_writes_into_a_folder_of_its_own():
    for path in FILES:
        assert path.read_text().splitlines()[1].startswith("# "), path
    folders = [(stages if path in STAGED else recipe).load(path).run_dir for path in FILES]
    assert len(set(folders)) == len(folders)


@contextmanager
def at_hand(path: Path) -> Iterator[list[str]]:
    """Have what a recipe needs running, and give the overrides that say where it is."""
    if path.stem != "served":
        yield []
        return
    with served(source().load()) as server:
        yield [f"teacher.url={server.url}", "teacher.of.model=code-teacher-tiny"]


@pytest.mark.parametrize("path", sorted((FOLDER / "sandbox").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_sandbox_recipe_trains_to_its_end(path, tmp_path):
    text = path.read_text()
    short = ["max_steps=2", "warmup_steps=0", "eval_strategy=no", "save_strategy=no", "per_device_train_batch_size=2"]
    overrides = [f"run_dir={tmp_path / 'run'}", "data.max_length=32", *(f"training.{change}" for change in short)]
    if "student: {name: sandbox" in text:
        reads = "-unigram" if "model: code-student-unigram" in text else ""
        overrides.append(f"student.model=code-student-tiny{reads}")
    if "teacher: {name: sandbox, model: code-teacher" in text:
        overrides.append("teacher.model=code-teacher-tiny")
    if "sandbox:code/eval" in text:
        overrides.append("data.eval.0.limit=1")
    with at_hand(path) as more:
        recipe = load(path, [*overrides, *TINY.get(path.stem, []), *more])
        if isinstance(recipe.teacher, CachedTeacherSection):
            recipe = load(path, [*overrides, *TINY[path.stem], f"teacher.path={tmp_path / 'capture'}"])
            capture(recipe)
        run = train(recipe)
    assert json.loads((run / "results.json").read_text())["steps"] == 2
    assert (run / "student" / "model.safetensors").is_file()
