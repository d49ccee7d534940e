"""OnPolicyTrainer: batches of the student's own text, and a gradient that does not show how they were cut."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import on_ranks
from loopback import source
from safetensors.torch import load_file
from scripted import openai_api, running

from kdlm import DistillTrainer, OnPolicyTrainer
from kdlm.data import Collator
from kdlm.losses import JSD, ForwardKL, ReverseKL
from kdlm.methods import GKD, LogitKD, MiniLLM, ReverseKLAdvantage
from kdlm.remote import Endpoint, Remote
from kdlm.rollouts import GenerateEngine, RolloutSection
from kdlm.signal import IGNORE_INDEX
from kdlm.teachers import OpenAITeacher

SECTION = {"sampling": {"max_new_tokens": 9}}


def prompts(count: int = 8, answers: bool = True) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        ids = torch.randint(5, 500, (6 + number % 4,), generator=generator).tolist()
        cut = 2 + number % 3 if answers else len(ids)
        made.append(
            {"input_ids": ids, "labels": [IGNORE_INDEX] * cut + ids[cut:], "index": number, "reference": str(number)}
        )
    return made


def trainer(arguments: Any, method: Any, *, layout: str = "padded", rollouts: Any = None, data=None, **options: Any):
    student = source("code-student-tiny")
    keys = {"reward", "engine"} & options.keys()
    own = {key: options.pop(key) for key in keys}
    made = OnPolicyTrainer(
        student.load().double(),
        source().load().double(),
        arguments(**options),
        method=method,
        rollouts=RolloutSection(**{**SECTION, **(rollouts or {})}),
        train_dataset=prompts() if data is None else data,
        processing_class=student.tokenizer(),
        data_collator=Collator(0, layout=layout),
        **own,
    )
    made.networks.double()
    return made


def weights(made: Any) -> dict[str, torch.Tensor]:
    made.train()
    made.close()
    return {name: p.detach().clone() for name, p in made.student.named_parameters()}


def assert_same(ours: Any, other: Any, tolerance: float = 1e-9) -> None:
    for name, weight in ours.items():
        torch.testing.assert_close(other[name], weight, rtol=tolerance, atol=tolerance)


def on_policy() -> GKD:
    return GKD([ReverseKL(), JSD(weight=0.5)], student_share=1.0)


def test_without_the_students_share_it_is_plain_distillation(arguments) -> None:
    ours = weights(trainer(arguments, GKD([ForwardKL()], student_share=0.0), max_steps=3))
    student = source("code-student-tiny")
    plain = DistillTrainer(
        student.load().double(), source().load().double(), arguments(max_steps=3), method=LogitKD([ForwardKL()]),
        train_dataset=prompts(), processing_class=student.tokenizer(),
    )  # fmt: skip
    plain.networks.double()
    assert_same(weights(plain), ours, 0.0)


@pytest.mark.parametrize(("beta", "end"), [(0.0, ForwardKL()), (1.0, ReverseKL())])
def test_the_ends_of_beta_are_the_two_divergences_on_own_text(arguments, beta: float, end: Any) -> None:
    jsd, kl = (
        weights(trainer(arguments, GKD([loss], student_share=1.0), max_steps=2)) for loss in (JSD(beta=beta), end)
    )
    assert_same(kl, jsd, 1e-12)


@pytest.mark.parametrize("samples", [1, 3])
def test_the_gradient_does_not_show_how_the_batch_was_cut(arguments, samples: int) -> None:
    rollouts = {"sampling": {"max_new_tokens": 9, "samples_per_prompt": samples}}
    whole = weights(trainer(arguments, on_policy(), rollouts=rollouts))
    for options in (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
        {"layout": "padding_free"},
    ):
        assert_same(whole, weights(trainer(arguments, on_policy(), rollouts=rollouts, **options)), 1e-8)
    start = dict(source("code-student-tiny").load().double().named_parameters())
    assert max((whole[name] - start[name]).abs().max() for name in start) > 1e-4


def seen(made: Any) -> list[dict[str, torch.Tensor]]:
    """Train, and return every batch that the method saw."""
    batches: list[dict[str, torch.Tensor]] = []
    losses = made.method.losses
    made.method.losses = lambda nets, batch, *rest: batches.append(batch) or losses(nets, batch, *rest)
    made.train()
    made.close()
    return batches


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
@pytest.mark.parametrize("text", ["student", "both"])
def test_a_batch_says_of_every_token_who_wrote_it(arguments, layout: str, text: str) -> None:
    method = on_policy()
    method.text = lambda step, draw: text
    made = trainer(
        arguments, method, layout=layout, rollouts={"sampling": {"max_new_tokens": 9, "samples_per_prompt": 2}},
        reward=lambda texts, rows: [float(row["reference"]) for row in rows],
    )  # fmt: skip
    (batch,) = seen(made)
    kept, sampled = batch["labels"] != IGNORE_INDEX, batch["sampled"]
    assert batch["input_ids"].shape == sampled.shape == batch["log_probs"].shape == batch["sequence"].shape
    assert (batch["labels"][kept] == batch["input_ids"][kept]).all()
    assert (batch["log_probs"][sampled] < 0).all() and (batch["log_probs"][~sampled] == 0).all()
    count = 8 * (3 if text == "both" else 2)
    assert batch["sequence"].max() == count - 1 and len(batch["truncated"]) == count
    if text == "student":
        assert (kept == sampled).all()
        assert sorted(batch["index"].tolist()) == sorted([*range(8)] * 2)
        assert (batch["reward"] == batch["index"]).all()
    else:
        assert (kept >= sampled).all() and (kept & ~sampled).any()
        assert batch["reward"].isnan().tolist() == [True] * 8 + [False] * 16


def test_the_log_probs_of_a_batch_are_the_students(arguments) -> None:
    made = trainer(arguments, on_policy(), learning_rate=0.0)
    (batch,) = seen(made)
    with torch.no_grad():
        logits = made.student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    drawn = batch["sampled"][:, 1:]
    torch.testing.assert_close(log_p[drawn].float(), batch["log_probs"][:, 1:][drawn], atol=1e-5, rtol=1e-5)


def test_truncated_completions_can_be_left_out(arguments) -> None:
    made = trainer(arguments, on_policy(), rollouts={"truncated": "mask", "sampling": {"max_new_tokens": 2}})
    (batch,) = seen(made)
    cut = batch["truncated"]
    assert cut.any()
    assert (batch["labels"][cut] == IGNORE_INDEX).all()


def test_prompts_alone_are_enough_where_no_answer_is_trained_on(arguments) -> None:
    (batch,) = seen(trainer(arguments, on_policy(), data=prompts(answers=False)))
    assert (batch["labels"] != IGNORE_INDEX).any()


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["the data's", "the student's"])
def test_rows_keep_their_weights_whoever_wrote_the_text(arguments, share: float) -> None:
    data = [row | {"weight": 0.5 * row["index"]} for row in prompts()]
    (batch,) = seen(trainer(arguments, GKD([ForwardKL()], student_share=share), data=data))
    assert ("sampled" in batch) == bool(share)
    assert batch["weight"].tolist() == (0.5 * batch["index"]).tolist()


def test_each_step_takes_the_text_that_its_draw_says(arguments) -> None:
    batches = seen(trainer(arguments, GKD([ForwardKL()], student_share=0.5), max_steps=40))
    own = ["sampled" in batch for batch in batches]
    assert 8 < sum(own) < 32
    again = seen(trainer(arguments, GKD([ForwardKL()], student_share=0.5), max_steps=40))
    assert own == ["sampled" in batch for batch in again]


def test_a_log_line_says_what_the_completions_were_like(arguments) -> None:
    made = trainer(
        arguments, on_policy(), max_steps=4, logging_steps=2, rollouts={"every": 2}, data=prompts(32),
        reward=lambda texts, rows: [1.0] * len(rows),
    )  # fmt: skip
    made.train()
    logs = [log for log in made.state.log_history if "loss" in log]
    assert [log["rollout/staleness"] for log in logs] == [0.5, 0.5]
    assert all(log["rollout/reward"] == 1.0 and 0 < log["rollout/length"] <= 9 for log in logs)
    assert all(0 <= log["rollout/truncated"] <= 1 and log["rollout/seconds_waiting"] > 0 for log in logs)


def test_evaluation_can_look_at_the_students_own_text(arguments) -> None:
    made = trainer(arguments, on_policy(), rollouts={"eval_prompts": 5}, reward=lambda texts, rows: [0.25] * len(rows))
    from datasets import Dataset

    made.eval_dataset = Dataset.from_list(prompts())
    metrics = made.evaluate()
    assert metrics["eval_rollout_reward"] == 0.25
    assert metrics["eval_rollout_reverse_kl"] > 0 and metrics["eval_reverse_kl"] > 0


def test_text_can_be_drawn_from_a_mixture_with_the_teacher(arguments) -> None:
    share = {"sampling": {"max_new_tokens": 9, "teacher_share": 0.4}}
    made = trainer(arguments, MiniLLM(importance_cap=float("inf")), rollouts=share, learning_rate=0.0)
    (batch,) = seen(made)
    drawn = batch["sampled"][:, 1:]
    logs = []
    for model in (made.student, made.teacher.model):
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        logs.append(logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)[drawn])
    mixed = (0.6 * logs[0].exp() + 0.4 * logs[1].exp()).log()
    torch.testing.assert_close(mixed.float(), batch["log_probs"][:, 1:][drawn], atol=1e-5, rtol=1e-5)
    log = next(log for log in made.state.log_history if "log_weight" in log)
    assert log["log_weight"] > 0.01 and "rollout/engine_gap" not in log


def test_a_mixture_wants_a_teacher_that_is_here(arguments) -> None:
    student = source("code-student-tiny")
    with running(openai_api(source().load())) as url:
        teacher = OpenAITeacher(Remote(Endpoint(url)), "tiny", 0, 512)
        with pytest.raises(ValueError, match="teacher_share: it takes the engine `generate` and a local teacher"):
            OnPolicyTrainer(
                student.load(), teacher, arguments(), method=ReverseKLAdvantage(),
                rollouts=RolloutSection(sampling={"teacher_share": 0.2}), processing_class=student.tokenizer(),
            )  # fmt: skip
        teacher.close()


def test_a_served_teacher_marks_sampled_tokens_as_a_local_one_does(arguments) -> None:
    """One number a token, asked for while the batch is laid out."""
    ours = weights(trainer(arguments, ReverseKLAdvantage(), max_steps=2))
    with running(openai_api(source().load())) as url:
        teacher = OpenAITeacher(Remote(Endpoint(url)), "tiny", 0, 512)
        student = source("code-student-tiny")
        made = OnPolicyTrainer(
            student.load().double(), teacher, arguments(max_steps=2), method=ReverseKLAdvantage(),
            rollouts=RolloutSection(**SECTION), train_dataset=prompts(), processing_class=student.tokenizer(),
        )  # fmt: skip
        made.networks.double()
        assert_same(ours, weights(made), 1e-5)


def test_a_method_on_own_text_wants_this_trainer(arguments) -> None:
    with pytest.raises(ValueError, match="use OnPolicyTrainer"):
        DistillTrainer(source("code-student-tiny").load(), source().load(), arguments(), method=on_policy())


def test_a_teacher_that_knows_given_text_only_is_refused(arguments) -> None:
    class Cached:
        provides = frozenset({"teacher"})
        known_text_only = True

    with pytest.raises(ValueError, match="knows given text only"):
        OnPolicyTrainer(
            source("code-student-tiny").load(), Cached(), arguments(), method=on_policy(),
            processing_class=source("code-student-tiny").tokenizer(),
        )  # fmt: skip


def test_two_ranks_write_and_learn_what_one_process_does(tmp_path: Path) -> None:
    """Greedy, so that which rank writes a completion does not matter; some steps are on the data's text."""
    script = Path(__file__).with_name("two_ranks_on_policy.py")
    source("code-student-tiny").load(), source().load()  # built before two processes want them
    for count, name in enumerate(("one", "two"), 1):
        (tmp_path / name).mkdir()
        on_ranks(count, script, tmp_path / name, str(8 // count))
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert_same(one, two, 1e-7)
    first, second = (json.loads((tmp_path / name / "logs.json").read_text()) for name in ("one", "two"))
    for name in ("loss", "jsd", "rollout/length", "rollout/staleness", "rollout/truncated"):
        assert [log.get(name, -1) for log in first] == pytest.approx([log.get(name, -1) for log in second], rel=1e-5)
    assert 0 < sum("rollout/length" in log for log in first) < 6


@pytest.mark.slow
@pytest.mark.timeout(600)  # ranks import for most of it
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_a_copy_writes_for_a_student_in_shares_of_zero3(tmp_path: Path) -> None:
    """Two ranks that hold shares of the student write, and learn of it, what one process does."""
    script = Path(__file__).with_name("two_ranks_on_policy.py")
    source("code-student-tiny").load(), source().load()  # built before two processes want them
    for count, how in ((1, "single"), (2, "zero3")):
        (tmp_path / how).mkdir()
        on_ranks(count, script, tmp_path / how, str(8 // count), how, seconds=280)
    one, two = (load_file(tmp_path / how / "weights.safetensors") for how in ("single", "zero3"))
    assert max(((two[name] - weight).norm() / weight.norm()).item() for name, weight in one.items()) < 1e-5
    first, second = (json.loads((tmp_path / how / "logs.json").read_text()) for how in ("single", "zero3"))
    for name in ("loss", "jsd", "rollout/length", "rollout/staleness", "rollout/truncated"):
        assert [log.get(name, -1) for log in first] == pytest.approx([log.get(name, -1) for log in second], rel=1e-5)
    assert 0 < sum("rollout/length" in log for log in first) < 6


def test_what_writes_under_zero3_is_a_copy_of_the_student(monkeypatch: pytest.MonkeyPatch, arguments) -> None:
    monkeypatch.setattr("kdlm.on_policy.cuts_weights", lambda accelerator: True)
    student = source("code-student-tiny")
    with pytest.raises(ValueError, match=r"rollouts\.engine: under ZeRO-3 a copy of the student writes"):
        OnPolicyTrainer(
            student.load(), source().load(), arguments(), method=on_policy(), processing_class=student.tokenizer(),
            engine=GenerateEngine([1], 0),
        )  # fmt: skip
