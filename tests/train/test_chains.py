"""Runs that follow one another: by an assistant, by generations, of a draft, and of models moved to one tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdlm import cli
from kdlm.losses import kept_rows
from kdlm.recipe import load
from kdlm.sandbox import build
from kdlm.signal import Hidden, Mixture
from kdlm.train import assemble

FOLDER = Path(__file__).parents[2] / "recipes" / "sandbox"
SHORT = [
    "data.max_length=32", "data.train.0.limit=2", "data.eval.0.limit=1", "training.max_steps=4",
    "training.per_device_train_batch_size=2", "training.save_steps=4", "training.eval_steps=4",
    "training.warmup_steps=0", "training.use_cpu=true",
]  # fmt: skip
STUDENT, TEACHER = "student.model=code-student-tiny", "teacher.model=code-teacher-tiny"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(name: str, *changes: str) -> int:
    return cli.main(["train", str(FOLDER / name), *SHORT, *changes])


def test_an_assistant_stands_between_teacher_and_student(capsys) -> None:
    assert run("chain/student.yaml", STUDENT) == 2
    assert "./runs/sandbox-chain-assistant/student: no such model folder" in capsys.readouterr().err
    assert run("chain/assistant.yaml", "student.source.model=code-teacher-tiny", "student.layers=1", TEACHER) == 0
    assert run("chain/student.yaml", STUDENT) == 0
    assistant = AutoModelForCausalLM.from_pretrained("runs/sandbox-chain-assistant/student")
    assert (
        assistant.num_parameters() < AutoModelForCausalLM.from_pretrained(build("code-teacher-tiny")).num_parameters()
    )
    card = Path("runs/sandbox-chain-student/student/README.md").read_text()
    assert "| teacher | ./runs/sandbox-chain-assistant/student |" in card
    results = json.loads(Path("runs/sandbox-chain-student/results.json").read_text())
    assert results["eval_kl_to_teacher"] > 0


def test_teacher_assistant_and_student_are_one_run_of_two_stages() -> None:
    tiny = ["assistant.student.source.model=code-teacher-tiny", "assistant.student.layers=1", f"assistant.{TEACHER}"]
    assert run("chain/stages.yaml", *tiny, f"last.{STUDENT}") == 0
    card = Path("runs/sandbox-chain/last/student/README.md").read_text()
    assert "| teacher | runs/sandbox-chain/assistant/student |" in card
    assert json.loads(Path("runs/sandbox-chain/results.json").read_text())["stages"]["last"]["eval_kl_to_teacher"] > 0


def test_models_of_two_tokenizers_teach_one_student_after_one_is_moved_to_the_others(capsys) -> None:
    others = [STUDENT, "teacher.members.0.model=code-teacher-tiny"]
    assert cli.main(["check", str(FOLDER / "fusion/fuse.yaml"), *others]) == 2
    said = capsys.readouterr().err
    assert "teacher.members.1: ./runs/sandbox-fusion-moved/student: no such model folder" in said
    assert "train the recipe with run_dir: runs/sandbox-fusion-moved first" in said
    source = ["student.source.model=code-student-tiny-unigram", "teacher.model=code-student-tiny-unigram"]
    assert run("fusion/move.yaml", *source, "student.tokenizer_from=sandbox:code-tokenizer-tiny") == 0
    assert run("fusion/fuse.yaml", *others, "teacher.weights={name: learned, positions: 60}") == 0
    metrics = [json.loads(line) for line in Path("runs/sandbox-fusion/metrics.jsonl").read_text().splitlines()]
    fitted = next(line for line in metrics if "teacher_weight/1" in line)
    assert fitted["teacher_weight/0"] > fitted["teacher_weight/1"]  # it is trained, the one that was moved is not
    both = "[{name: sandbox, model: code-teacher-tiny}, {name: local, path: ./runs/sandbox-fusion-moved/student}]"
    foreign = ["student.model=code-student-tiny-unigram", f"teacher={{name: ensemble, members: {both}}}"]
    assert run("alm.yaml", *foreign) == 0  # a third tokenizer, which neither of the two has
    Path("runs/sandbox-fusion-moved/student").rename("moved")
    assert cli.main(["check", str(FOLDER / "fusion/fuse.yaml"), *others]) == 2
    assert "has not ended: kdlm train runs/sandbox-fusion-moved/recipe.yaml --resume" in capsys.readouterr().err
    assert cli.main(["train", "runs/sandbox-fusion-moved/recipe.yaml", "--resume"]) == 0
    assert Path("runs/sandbox-fusion-moved/student").is_dir()


def test_a_generation_learns_from_the_one_before_and_from_the_base_teacher() -> None:
    assert run("generations/first.yaml", STUDENT, TEACHER) == 0
    base = "teacher.members.1.model=code-teacher-tiny"
    assert run("generations/next.yaml", STUDENT, base) == 0
    third = ["teacher.members.0.path=./runs/sandbox-generation-2/student", "run_dir=runs/sandbox-generation-3"]
    assert run("generations/next.yaml", STUDENT, base, *third) == 0
    trainer = assemble(load(FOLDER / "generations/next.yaml", [*SHORT, STUDENT, base, *third])).trainer
    batch = next(iter(trainer.get_eval_dataloader()))
    signal = trainer.teacher(batch, kept_rows(batch["labels"]))
    assert isinstance(signal, Mixture) and all(isinstance(member, Hidden) for member in signal.members)
    torch.testing.assert_close(signal.log_weights[0].exp(), torch.tensor([0.7, 0.3]))


def test_a_student_works_sums_under_a_teacher_of_sums() -> None:
    sums = ["data.max_length=128", "data.eval.0.limit=4", "data.train.0.limit=20"]
    assert run("sums/teacher.yaml", "student.model=code-teacher-tiny", *sums) == 0
    assert run("sums/warm_up.yaml", STUDENT, *sums) == 0
    rollouts = ["rollouts.sampling.max_new_tokens=8", "rollouts.eval_prompts=4"]
    assert run("sums/on_policy.yaml", *sums, *rollouts) == 0
    results = json.loads(Path("runs/sandbox-sums-on-policy/results.json").read_text())
    assert 0 <= results["eval_rollout_reward"] <= 1 and results["eval_rollout_reverse_kl"] > 0


def test_a_student_calls_tools_under_a_teacher_of_tools() -> None:
    short = [change for change in SHORT if "eval.0" not in change]
    calls = ["data.max_length=128", "data.train.0.limit=20", "training.logging_steps=1"]
    for name, *more in (
        ("teacher", STUDENT),
        ("warm_up", STUDENT),
        ("on_policy", "rollouts.sampling.max_new_tokens=8"),
    ):
        assert cli.main(["train", str(FOLDER / f"tools/{name}.yaml"), *short, *calls, *more]) == 0
    lines = Path("runs/sandbox-tools-on-policy/metrics.jsonl").read_text().splitlines()
    log = next(line for line in map(json.loads, lines) if "rollout/turns" in line)
    assert log["rollout/turns"] >= 1 and 0 <= log["rollout/success"] <= 1


def test_a_reviser_is_trained_first_and_then_distilled_into_its_generator(capsys) -> None:
    short = [one for one in SHORT if "eval" not in one] + ["rollouts.sampling.max_new_tokens=4"]
    distil = [*short, "data.eval.0.limit=1", "training.eval_steps=4", "rollouts.eval_prompts=1"]
    assert cli.main(["train", str(FOLDER / "sd_zero/distil.yaml"), *distil]) == 2
    assert "./runs/sandbox-sd-zero-revise/student: no such model folder" in capsys.readouterr().err
    first = [*short, STUDENT, "training.logging_steps=1", "rollouts.environment.success=0", "method.success=0"]
    assert cli.main(["train", str(FOLDER / "sd_zero/revise.yaml"), *first]) == 0
    assert cli.main(["train", str(FOLDER / "sd_zero/distil.yaml"), *distil, "training.logging_steps=1"]) == 0
    of_both = [
        [json.loads(line) for line in Path(f"runs/sandbox-sd-zero{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("-revise", "")
    ]
    assert all(0 <= line["revised"] <= 1 for line in of_both[0] if "revised" in line)
    assert any("loss_wrong" in line and 0 <= line["informed"] <= 1 for line in of_both[1])


def test_a_draft_is_pretrained_and_then_aligned_with_its_target_on_either_text() -> None:
    short = ["training.logging_steps=4"]
    assert run("draft/pretrain.yaml", STUDENT, *short) == 0
    Path("runs/sandbox-draft-answers.jsonl").write_text('{"prompt": "def f(", "completion": "self, x):"}\n')
    assert run("draft/align.yaml", TEACHER, *short) == 0
    own = ["data.max_length=32", "rollouts.prompt_tokens=8", "rollouts.sampling.max_new_tokens=8"]
    assert run("draft/distillspec.yaml", TEACHER, *own, *short) == 0
    start = json.loads(Path("runs/sandbox-draft-pretrain/results.json").read_text())
    for name in ("align", "distillspec"):
        results = json.loads(Path(f"runs/sandbox-draft-{name}/results.json").read_text())
        assert results["steps"] == 4
        assert results["eval_cross_entropy"] != start["eval_cross_entropy"]


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("anchor", [0.05, 0.3, 1.0])
def test_generations_that_match_their_target_come_geometrically_closer_to_the_base_teacher(anchor: float) -> None:
    """`KL(p_n+1 || p_0) <= (1 - a) KL(p_n || p_0)`: convexity of the KL in its first argument."""
    base, p = (torch.randn(50, 31, dtype=torch.float64).mul(3).softmax(-1) for _ in range(2))
    distance = kl(p, base)
    for _ in range(30):
        p = (1 - anchor) * p + anchor * base
        assert (kl(p, base) <= (1 - anchor) * distance + 1e-15).all()
        distance = kl(p, base)
    if anchor > 0.1:
        torch.testing.assert_close(p, base, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((1 - anchor) * base + anchor * base, base)  # the fixed point


def test_further_pretraining_begins_from_the_initial_weights_again_and_not_from_its_teachers(capsys) -> None:
    first, second = (load(FOLDER / f"further_pretraining/{name}.yaml") for name in ("teacher", "student"))
    assert first.student == second.student and first.data == second.data
    assert run("further_pretraining/student.yaml", STUDENT) == 2
    assert "./runs/sandbox-further-teacher/student: no such model folder" in capsys.readouterr().err
    for name in ("teacher", "student"):
        assert run(f"further_pretraining/{name}.yaml", STUDENT) == 0
    began, taught, teacher = (
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (
            build("code-student-tiny"), "runs/sandbox-further-student/student", "runs/sandbox-further-teacher/student"
        )
    )  # fmt: skip
    to_start, to_teacher = (
        torch.cat([(a - b).flatten() for a, b in zip(taught.parameters(), other.parameters(), strict=True)]).norm()
        for other in (began, teacher)
    )
    between = torch.cat([(a - b).flatten() for a, b in zip(began.parameters(), teacher.parameters(), strict=True)])
    assert 0 < to_start and 0 < to_teacher < between.norm()
    results = json.loads(Path("runs/sandbox-further-student/results.json").read_text())
    assert results["eval_anchor"] > 0
