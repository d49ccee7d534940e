"""PrivateTrainer: which gradient a private step takes, and how much of it one row can be."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from loopback import source

from kdlm import DistillTrainer, OnPolicyTrainer
from kdlm.data import Collator
from kdlm.guards import GuardsSection, Limit, Watched
from kdlm.losses import JSD, CrossEntropy
from kdlm.methods import GKD, SequenceKD
from kdlm.privacy import PrivacySection
from kdlm.privacy.trainer import PrivateOnPolicyTrainer, PrivateTrainer
from kdlm.rollouts import Completion, RolloutSection, Sampling
from kdlm.signal import IGNORE_INDEX

WIDE = 1e9
"""A clip that no gradient reaches."""


def prompts(count: int = 8, answer: int | None = None) -> list[dict[str, Any]]:
    """Rows of different lengths; `answer` gives all of them as many trained tokens."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        ids = torch.randint(5, 500, (6 + number % 4,), generator=generator).tolist()
        cut = 2 + number % 3 if answer is None else len(ids) - answer
        made.append({"input_ids": ids, "labels": [IGNORE_INDEX] * cut + ids[cut:], "index": number})
    return made


class Scripted:
    """An engine whose completions follow from the prompt alone, so that rows do not touch each other."""

    lives = True

    def __init__(self, length: int | None = None, stop: Any = "end"):
        self.length, self.stop = length, stop

    def take(self, student: Any, version: int) -> None: ...

    def close(self) -> None: ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        done = []
        for group, prompt in enumerate(prompts):
            for sample in range(sampling.samples_per_prompt):
                size = self.length or 2 + (sum(prompt) + sample) % 5
                ids = [5 + (sum(prompt) * (place + 1) + sample) % 490 for place in range(size)]
                done.append(Completion(ids, [-1.0] * size, self.stop, group, 0))
        return done


def parts(arguments: Any, data: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    student = source("code-student-tiny")
    # One step of plain SGD at rate 1: the difference of the weights is the gradient.
    args = arguments(**{"learning_rate": 1.0, "per_device_train_batch_size": len(data), **options})
    given = {"train_dataset": data, "processing_class": student.tokenizer(), "data_collator": Collator(0)}
    return (student.load().double(), source().load().double(), args), given


def private(
    arguments: Any,
    *,
    share: float = 1.0,
    samples: int = 1,
    data: Any = None,
    engine: Any = None,
    method: Any = None,
    **options,
):
    """A private trainer of GKD: on the student's own text, or, at share 0, on given text without rollouts."""
    keys = {"clip", "noise", "epsilon", "delta", "seed", "accountant"} & options.keys()
    section = PrivacySection(
        **{"clip": WIDE, "noise": 0.0, "seed": 0, "delta": 1e-5, **{k: options.pop(k) for k in keys}}
    )
    data = prompts() if data is None else data
    networks, given = parts(arguments, data, **options)
    given |= {"method": method or GKD([JSD(beta=0.5)], student_share=share), "privacy": section}
    if share:
        rollouts = RolloutSection(sampling={"max_new_tokens": 9, "samples_per_prompt": samples})  # pyright: ignore
        engine = Scripted() if engine is None else engine
        made: Any = PrivateOnPolicyTrainer(*networks, rollouts=rollouts, engine=engine, **given)
    else:
        made = PrivateTrainer(*networks, **given)
    made.networks.double()
    return made


def gradient(made: Any) -> dict[str, torch.Tensor]:
    """Train one step, and return the gradient that the weights were moved by."""
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    made.train()
    made.close()
    return {name: before[name] - p.detach() for name, p in made.student.named_parameters()}


def norm(grads: dict[str, torch.Tensor]) -> float:
    return torch.nn.utils.get_total_norm(list(grads.values())).item()


def minus(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one[name] - other[name] for name in one}


def assert_same(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert norm(minus(ours, other)) <= tolerance * norm(other)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_without_noise_and_clip_it_is_plain_gkd_where_all_rows_have_as_many_tokens(arguments, share: float) -> None:
    data = prompts(answer=3)
    ours = gradient(private(arguments, share=share, data=data, engine=Scripted(4)))
    networks, given = parts(arguments, data)
    given["method"] = GKD([JSD(beta=0.5)], student_share=share)
    if share:
        plain: Any = OnPolicyTrainer(*networks, rollouts=RolloutSection(), engine=Scripted(4), **given)
    else:
        plain = DistillTrainer(*networks, **given)
    plain.networks.double()
    assert_same(ours, gradient(plain), 1e-12)


@pytest.mark.parametrize("samples", [1, 3])
def test_without_noise_and_clip_it_is_the_mean_over_rows_of_each_rows_own_gkd(arguments, samples: int) -> None:
    data = prompts(4)
    ours = gradient(private(arguments, samples=samples, data=data))
    rollouts = RolloutSection(sampling={"samples_per_prompt": samples})  # pyright: ignore
    alone = []
    for row in data:
        networks, given = parts(arguments, [row])
        plain = OnPolicyTrainer(
            *networks, rollouts=rollouts, engine=Scripted(), method=GKD([JSD(beta=0.5)], student_share=1.0), **given
        )
        plain.networks.double()
        alone.append(gradient(plain))
    mean = {name: sum(one[name] for one in alone) / len(alone) for name in ours}
    assert_same(ours, mean, 1e-12)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_row_with_all_its_rollouts_is_clipped_once(arguments, samples: int) -> None:
    clip = 0.01
    free = norm(gradient(private(arguments, samples=samples, data=prompts(1))))
    held = norm(gradient(private(arguments, samples=samples, data=prompts(1), clip=clip)))
    assert free > 3 * clip  # three rollouts clipped one by one could add up to more than one clip
    assert held == pytest.approx(clip, rel=1e-3) and held <= clip


def test_no_row_adds_more_than_the_clip_and_a_short_one_is_left_as_it_is(arguments) -> None:
    data, norms = prompts(4), []
    for row in data:
        norms.append(norm(gradient(private(arguments, data=[row]))))
    clip = sorted(norms)[2]
    for row, free in zip(data, norms, strict=True):
        held = norm(gradient(private(arguments, data=[row], clip=clip)))
        assert held <= clip and held == pytest.approx(min(free, clip), rel=1e-4)


@pytest.mark.parametrize("samples", [1, 2])
def test_one_row_more_changes_the_sum_by_at_most_the_clip_and_another_by_twice_that(arguments, samples: int) -> None:
    clip, data = 0.02, prompts(6)

    def total(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        grads = gradient(private(arguments, samples=samples, data=rows, clip=clip))
        return {name: grad * len(rows) for name, grad in grads.items()}  # the step divides by the expected number

    whole, less, other = total(data[:5]), total(data[:4]), total([*data[:4], data[5]])
    assert 0.5 * clip < norm(minus(whole, less)) <= clip
    assert norm(minus(whole, other)) <= 2 * clip


def test_a_gradient_that_is_not_finite_is_left_out(arguments) -> None:
    made = private(arguments, share=0.0, data=prompts(2), clip=1.0)
    made.create_optimizer()
    weights = made._private.params
    for weight in weights:
        weight.grad = torch.full_like(weight, torch.nan)
    made._private.take_unit()
    assert made._private.sum_norm() == 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_cut_into_micro_batches_changes_nothing_noise_included(arguments, share: float) -> None:
    options = {"share": share, "data": prompts(12), "noise": 0.5, "clip": 0.05, "max_steps": 3, "learning_rate": 0.1}
    whole = gradient(private(arguments, per_device_train_batch_size=6, **options))
    for size, parts in ((1, 6), (2, 3)):
        cut = private(arguments, per_device_train_batch_size=size, gradient_accumulation_steps=parts, **options)
        for name, grad in gradient(cut).items():
            assert torch.equal(grad, whole[name])


def test_the_noise_has_the_scale_of_the_clip_and_comes_once_a_step(arguments) -> None:
    data, clip, noise = prompts(4), 0.1, 3.0
    options = {"share": 0.0, "data": data, "clip": clip, "gradient_accumulation_steps": 2}
    still = gradient(private(arguments, per_device_train_batch_size=2, **options))
    noisy = gradient(private(arguments, per_device_train_batch_size=2, noise=noise, **options))
    drawn = torch.cat([value.flatten() for value in minus(noisy, still).values()]) * len(data)
    count = len(drawn)
    assert drawn.std().item() == pytest.approx(noise * clip, rel=5 / (2 * count) ** 0.5)  # five standard errors
    assert abs(drawn.mean().item()) < 5 * noise * clip / count**0.5


def test_a_step_that_drew_no_row_takes_noise_alone(arguments) -> None:
    data = prompts(40)
    made = private(arguments, data=data, per_device_train_batch_size=1, max_steps=30, noise=1.0, clip=0.01, seed=3)
    seen: list[int] = []
    counted = made._get_num_items_in_batch
    made._get_num_items_in_batch = lambda batches, device: (
        seen.append(sum(len(one["units"]) for one in batches)) or counted(batches, device)
    )
    moved = gradient(made)
    assert 0 in seen and max(seen) > 1 and len(seen) == 30
    assert made.spent()["steps"] == 30
    assert norm(moved) > 0 and all(value.isfinite().all() for value in moved.values())


def test_rows_are_drawn_each_with_the_same_probability(arguments) -> None:
    made = private(arguments, share=0.0, data=prompts(8), per_device_train_batch_size=2)
    sampler: Any = made.get_train_dataloader().batch_sampler
    steps = [row for _ in range(500) for row in _next_pass(made, sampler)]
    taken = torch.tensor([[row in step for row in range(8)] for step in steps]).double()
    rate, error = 0.25, 5 * (0.25 * 0.75 / len(steps)) ** 0.5
    assert (taken.mean(0) - rate).abs().max() < error
    sizes = taken.sum(1)
    assert sizes.var().item() == pytest.approx(8 * rate * (1 - rate), rel=0.15)  # of a binomial law, not of a shuffle


def _next_pass(made: Any, sampler: Any) -> list[list[int]]:
    drawn = list(sampler)
    made.state.global_step += len(drawn)
    return drawn


def test_without_a_seed_the_noise_is_another_each_time(arguments) -> None:
    one, other = (
        gradient(private(arguments, share=0.0, data=prompts(2), noise=1.0, clip=0.1, seed=None)) for _ in range(2)
    )
    assert norm(minus(one, other)) > 0.1


def test_a_completion_that_another_prompt_may_have_cut_is_refused(arguments) -> None:
    """The engine leaves all completions of a batch as much room as the longest of its prompts leaves."""
    with pytest.raises(ValueError, match=r"rollouts\.sampling\.max_new_tokens: 9 tokens do not fit behind"):
        private(arguments, data=prompts(2), engine=Scripted(8, "length")).train()
    private(arguments, data=prompts(2), engine=Scripted(9, "length")).train()  # cut where it was asked for


def test_a_guard_that_stops_is_refused_in_python_too(arguments) -> None:
    made = private(arguments, share=0.0, data=prompts(2))
    with pytest.raises(ValueError, match=r"guards\.entropy\.stop: it ends the run by a figure"):
        made.guard(GuardsSection(entropy=Watched(stop=Limit(below=0.1))))


def test_rows_with_weights_are_refused_in_python_too(arguments) -> None:
    with pytest.raises(ValueError, match=r"columns\.weight: a unit's loss is the mean over its own tokens"):
        private(arguments, share=0.0, data=[row | {"weight": 2.0} for row in prompts(2)])


def test_it_trains_once(arguments) -> None:
    made = private(arguments, share=0.0, data=prompts(2))
    made.train()
    with pytest.raises(RuntimeError, match="trains once"):
        made.train()


def test_canaries_show_less_the_smaller_epsilon_is(arguments) -> None:
    """Exposure (Carlini et al. 2019, arXiv 1802.08232): by how many bits a canary ranks before others of its form."""
    ids = torch.randint(5, 500, (8, 128, 10), generator=torch.Generator().manual_seed(5))
    ids[..., :4] = ids[:, :1, :4]  # eight prompts with 128 secrets each, of which the first is trained on
    rows = [
        {"input_ids": one.tolist(), "labels": [*[IGNORE_INDEX] * 4, *one[4:].tolist()], "index": number}
        for number, one in enumerate(ids[:, 0])
    ]

    def exposure(noise: float) -> tuple[float, float]:
        options = {"per_device_train_batch_size": 4, "max_steps": 30, "logging_steps": 30, "optim": "adamw_torch"}
        method, clip = SequenceKD([CrossEntropy()]), 1.0 if noise else WIDE
        made = private(
            arguments, share=0.0, data=rows, method=method, noise=noise, clip=clip, learning_rate=0.01, **options
        )
        made.train()
        with torch.no_grad():
            logs = made.student(input_ids=ids.flatten(0, 1)).logits[:, 3:-1].log_softmax(-1)
        scores = logs.gather(-1, ids.flatten(0, 1)[:, 4:, None]).sum((1, 2)).view(8, 128)
        ranks = (scores >= scores[:, :1]).sum(1)
        return made.spent()["epsilon"] or math.inf, 7 - ranks.double().log2().mean().item()

    (free, shown), (weak, some), (strong, little) = (exposure(noise) for noise in (0.0, 1.0, 30.0))
    assert free > weak > strong
    assert shown > 6.5 and shown > some > little and little < 3  # of 7 bits; a secret that is not known has about 1.4
