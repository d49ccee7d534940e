"""TeacherGRPOTrainer: TRL's GRPO where the teacher has no say, and the teacher in its ratio or its KL where it has."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from forks import on_ranks
from loopback import source
from safetensors.torch import load_file
from scripted import openai_api, running
from torch import Tensor

trl = pytest.importorskip("trl")

from kdlm.remote import Endpoint, Remote  # noqa: E402
from kdlm.reward_trainer import LEAST, TeacherGRPOTrainer  # noqa: E402
from kdlm.teachers import Ensemble, LocalTeacher, OpenAITeacher  # noqa: E402

TEXTS = ["def add(a, b):\n", "x = 3", "for i in range(9):\n    ", "import os", "class A:\n", "return", "if x", "y = "]


def spread(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that tells completions of a group apart."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def alike(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [1.0 for _ in completion_ids]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        defaults = {
            **{"output_dir": str(tmp_path / "run"), "report_to": "none", "use_cpu": True, "disable_tqdm": True},
            **{"gradient_checkpointing": None, "max_steps": 3, "learning_rate": 0.01, "lr_scheduler_type": "constant"},
            **{"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6},
            **{"save_strategy": "no", "logging_steps": 1, "seed": 3, "bf16": False},
        }
        return trl.GRPOConfig(**defaults | options)

    return make


def made(args: Any, kind: Any = TeacherGRPOTrainer, *, reward: Any = spread, student: Any = None, **options: Any):
    built = source("code-student-tiny")
    return kind(
        built.load() if student is None else student,
        reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=built.tokenizer(),
        **options,
    )


def weights(trainer: Any, **options: Any) -> dict[str, Tensor]:
    trainer.train(**options)
    return {name: p.detach().clone() for name, p in trainer.student.named_parameters()}


def assert_same(ours: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    for name, weight in ours.items():
        torch.testing.assert_close(other[name], weight, rtol=tolerance, atol=tolerance)


def moved(ours: dict[str, Tensor]) -> float:
    start = dict(source("code-student-tiny").load().named_parameters())
    return max((ours[name] - start[name]).abs().max().item() for name in start)


class Plain(trl.GRPOTrainer):
    @property
    def student(self) -> Any:
        return self.model


def batch_of(trainer: Any) -> dict[str, Any]:
    """A generation batch, as a step takes it: with what the trainer puts into the old student's place."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [{"prompt": text} for text in TEXTS[:2] for _ in range(4)]
    return trainer._generate_and_score_completions(rows)


def by_hand(model: Any, batch: dict[str, Any], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the completions, each sequence read by itself and without padding."""
    out = torch.zeros_like(batch["completion_ids"], dtype=torch.float32)
    for row in range(len(out)):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        drawn = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.cat([prompt, drawn])[None]).logits[0]
        log_p = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        out[row, : len(drawn)] = log_p.gather(-1, drawn[:, None])[:, 0]
    return out


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_at_a_ratio_of_1_it_is_trls_grpo_bit_for_bit(config, loss_type: str, iterations: int) -> None:
    options = {"loss_type": loss_type, "num_iterations": iterations, "gradient_accumulation_steps": 2, "max_steps": 4}
    theirs = weights(made(config(**options), Plain))
    ours = made(config(**options), teacher=source().load(), ratio=1.0)
    assert_same(theirs, weights(ours))
    assert moved(theirs) > 1e-3


def test_loss_and_gradient_of_one_batch_are_trls(config) -> None:
    ours, theirs = made(config(), teacher=source().load()), made(config(), Plain)
    batch = batch_of(ours)
    for one in (ours, theirs):
        one.model.train()
        one.current_gradient_accumulation_steps = 1
        one._compute_loss(one.model, batch).backward()
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_stands_for_the_old_student_lies_between_it_and_the_teacher(config, temperature, level) -> None:
    teacher = source().load()
    args = config(temperature=temperature, importance_sampling_level=level, loss_type="grpo")
    trainer = made(args, teacher=teacher, ratio=0.3, bound=1.5)
    batch = batch_of(trainer)
    q, p = (by_hand(model, batch, temperature) for model in (trainer.model, teacher))
    wanted = q - 0.7 * (q - p).clamp(-1.5, 1.5)
    there = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_per_token_logps"][there], wanted[there], rtol=1e-4, atol=1e-4)
    assert ((q - p).abs()[there] > 1.5).any() and ((q - p).abs()[there] < 1.5).any()
    # r is not 1 at the first step, where q = q_old: the clip is at work from the beginning.
    ratio = (q - wanted).exp()[there]
    assert (ratio > 1.2).any() and (ratio < 0.8).any()
    noted = trainer._metrics["train"]
    assert noted["teacher/reverse_kl"][0] == pytest.approx((q - p)[there].mean().item(), rel=1e-3)
    assert noted["teacher/bounded"][0] == pytest.approx(((q - p).abs()[there] > 1.5).float().mean().item(), abs=0.02)


def test_a_teacher_that_is_the_old_student_makes_every_ratio_the_same(config) -> None:
    class Echo(TeacherGRPOTrainer):
        def scored(self, teacher: Any, ids: Tensor, mask: Tensor, last: int) -> Tensor:
            return self._get_per_token_logps_and_entropies(self.model, ids, mask, last)[0]

    def run(ratio: float) -> dict[str, Tensor]:
        return weights(made(config(num_iterations=2, max_steps=4), Echo, teacher=source().load(), ratio=ratio))

    whole = run(1.0)
    assert moved(whole) > 1e-3
    for ratio in (0.5, 0.0):
        assert_same(whole, run(ratio))


def gradient(trainer: Any, batch: dict[str, Any]) -> list[Tensor]:
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    return [p.grad for p in trainer.model.parameters()]


def test_below_the_clip_a_better_completion_becomes_likelier_and_above_it_nothing_moves(config) -> None:
    trainer = made(config(), teacher=source().load(), ratio=0.5)
    batch = batch_of(trainer)
    batch["advantages"] = torch.ones_like(batch["advantages"])
    before = by_hand(trainer.model, batch)
    fixed = dict(batch)
    fixed["old_per_token_logps"] = before + 0.4  # q below what lies between old student and teacher
    for p, g in zip(trainer.model.parameters(), gradient(trainer, fixed), strict=True):
        p.data -= 1e-2 * g
    after = by_hand(trainer.model, batch)
    there = batch["completion_mask"].bool()
    assert (after - before)[there].sum() > 0
    fixed["old_per_token_logps"] = after - 0.4
    assert all(bool((g == 0).all()) for g in gradient(trainer, fixed))
    fixed["advantages"] = -batch["advantages"]  # a worse completion is pushed down from there
    assert any(bool((g != 0).any()) for g in gradient(trainer, fixed))


def test_groups_of_equal_rewards_teach_nothing(config) -> None:
    for options in ({"ratio": 0.5}, {"ratio": 0.0}):
        assert moved(weights(made(config(), reward=alike, teacher=source().load(), **options))) == 0.0


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "num_iterations": 2}, {"use_bias_correction_kl": False}])
def test_a_kl_to_the_teacher_is_trls_with_the_teacher_as_reference_model(config, tmp_path: Path, options) -> None:
    source().load().save_pretrained(tmp_path / "teacher")
    student = source("code-student-tiny").load()
    student.config._name_or_path = str(tmp_path / "teacher")  # which TRL takes the reference model from
    options = {"optim": "sgd", "learning_rate": 0.3, **options}
    theirs = weights(made(config(beta=0.3, **options), Plain, student=student))
    ours = weights(made(config(**options), teacher=source().load(), kl=0.3))
    without = weights(made(config(**options), teacher=source().load()))
    assert_same(theirs, ours, 1e-5)
    assert max((ours[name] - without[name]).abs().max() for name in ours) > 2e-3


def test_every_kind_of_teacher_scores_the_same_tokens(config) -> None:
    teacher = source().load()
    trainer = made(config(), teacher=teacher, ratio=0.5)
    batch = batch_of(trainer)
    batch["completion_mask"][0] = 0  # as TRL masks a completion that was cut
    ids, mask = (torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    last = batch["completion_ids"].shape[1]
    wanted = by_hand(teacher, batch) * batch["completion_mask"]
    local = LocalTeacher(teacher)
    several = Ensemble([local, LocalTeacher(teacher, "dense")])
    with running(openai_api(teacher)) as url:
        server = OpenAITeacher(Remote(Endpoint(url)), "tiny", 0, 512)
        for one in (local, several, server):
            torch.testing.assert_close(trainer.scored(one, ids, mask, last), wanted, rtol=1e-4, atol=1e-4)
        trainer.temperature = 0.7
        with pytest.raises(ValueError, match="scores tokens at temperature 1 only"):
            trainer.scored(server, ids, mask, last)
        trainer.teacher = server
        trainer.close()


def test_a_token_that_the_teacher_does_not_know_stays_finite(config) -> None:
    few = made(config(loss_type="grpo"), teacher=source().load(), ratio=0.5, vocab=40)
    batch = batch_of(few)
    ids, mask = (torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    scored = few.scored(few.teacher, ids, mask, batch["completion_ids"].shape[1])
    unknown = (batch["completion_ids"] >= 40) & batch["completion_mask"].bool()
    assert unknown.any() and (scored[unknown] == LEAST).all()
    assert all(bool(torch.isfinite(g).all()) for g in gradient(few, batch))


@pytest.mark.parametrize("options", [{"ratio": 0.4}, {"kl": 0.2}])
def test_a_run_goes_on_from_any_checkpoint_as_if_it_had_never_ended(config, options) -> None:
    """Each generation is trained on in two passes of two steps, and the second epoch begins after four of eight."""
    more = {
        **{"max_steps": 12, "num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        **{"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 3},
    }
    whole = made(config(**more), teacher=source().load(), **options)
    ended = weights(whole)
    logs = whole.state.log_history
    assert moved(ended) > 1e-3 and whole.state.epoch > 1
    for step in (1, 3, 4, 6, 8, 11):
        again = made(config(**more), teacher=source().load(), **options)
        folder = Path(again.args.output_dir) / f"checkpoint-{step}"
        assert_same(ended, weights(again, resume_from_checkpoint=str(folder)))
        for name in ("reward", "kl", "entropy", "teacher/reverse_kl", "num_tokens"):
            said = [[log[name] for log in one if name in log] for one in (logs, again.state.log_history)]
            assert said[0] == said[1], name


def test_a_damaged_checkpoint_is_refused_by_name(config) -> None:
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    made(config(**options)).train()
    folder = Path(config().output_dir) / "checkpoint-1"
    (folder / "rollouts_0.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"rollouts_0\.pt: damaged"):
        made(config(max_steps=2)).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({}, {"ratio": 0.5}, "teacher: a ratio below 1 and a KL take one"),
        ({}, {"ratio": 1.5}, "ratio 1.5"),
        ({"beta": 0.1}, {"kl": 0.1, "teacher": True}, "leave beta at 0"),
        ({}, {"kl": 0.1, "ratio": 0.5, "teacher": True}, "use_bias_correction_kl"),
        ({"off_policy_mask_threshold": 0.5}, {"ratio": 0.5, "teacher": True}, "off_policy_mask_threshold"),
    ],
)
def test_what_contradicts_itself_is_refused(config, settings: Any, options: Any, said: str) -> None:
    teacher = {"teacher": source().load()} if options.pop("teacher", False) else {}
    with pytest.raises(ValueError, match=said):
        made(config(**settings), **options, **teacher)


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_does(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_ranks_rewards.py")
    source("code-student-tiny").load(), source().load()  # built before two processes want them
    for count, name in enumerate(("one", "two"), 1):
        (tmp_path / name).mkdir()
        on_ranks(count, script, tmp_path / name, str(16 // count))
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert moved(one) > 1e-3
    assert_same(one, two, 1e-5)
    first, second = (json.loads((tmp_path / name / "logs.json").read_text()) for name in ("one", "two"))
    for name in ("reward", "teacher/reverse_kl", "teacher/bounded", "rollout/length"):
        assert [log[name] for log in first] == pytest.approx([log[name] for log in second], rel=1e-4), name


def test_of_two_rewarded_tokens_the_teachers_wins_and_grpo_does_not_choose(config) -> None:
    """Reward is for either of two first tokens, of which the teacher finds one likely and the other one not."""
    teacher = source().load()
    likely, unlikely = 70, 80
    built = source("code-student-tiny").load()
    with torch.no_grad():
        for model, scores in ((teacher, {likely: 6.0, unlikely: -6.0}), (built, {likely: 4.0, unlikely: 4.0})):
            head = torch.nn.Linear(*reversed(model.get_output_embeddings().weight.shape))
            head.weight.copy_(model.get_output_embeddings().weight * 0.1)
            head.bias.zero_()
            for token, score in scores.items():
                head.bias[token] = score
            model.config.tie_word_embeddings = False
            model.set_output_embeddings(head)

    def either(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(ids[0] in (likely, unlikely)) for ids in completion_ids]

    def run(ratio: float) -> tuple[list[float], float, float]:
        options = {"max_completion_length": 1, "max_steps": 30, "learning_rate": 0.02}
        trainer = made(
            config(**options, per_device_train_batch_size=32, num_generations=16, num_iterations=2),
            reward=either, student=copy.deepcopy(built), teacher=copy.deepcopy(teacher), ratio=ratio,
        )  # fmt: skip
        trainer.train()
        ids = torch.tensor([trainer.processing_class(TEXTS[0])["input_ids"]])
        with torch.no_grad():
            p = trainer.student.eval()(input_ids=ids).logits[0, -1].softmax(-1)
        rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
        return rewards, p[likely].item(), p[unlikely].item()

    rewards, good, bad = run(0.5)
    assert rewards[0] < 0.5 and rewards[-1] > 0.95 and good > 0.9 and bad < 0.05
    rewards, _, bad = run(1.0)
    assert rewards[-1] > 0.95 and bad > 0.05
