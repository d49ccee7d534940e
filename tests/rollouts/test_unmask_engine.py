"""The engine `unmask`: what it fills in, in which order, with which log-probabilities."""

from typing import Any

import pytest
import torch
from tiny_masked import END, MASK, tiny_masked

from kdlm.rollouts import Sampling, UnmaskEngine, UnmaskSection, check_engine
from kdlm.rollouts.generate import drawn_from
from kdlm.rollouts.sections import RolloutSection

PROMPTS = [[3, 4, 5], [7, 8], [2, 9, 10, 11, 3]]


def engine(model: Any = None, **options: Any) -> UnmaskEngine:
    made = UnmaskEngine(options.pop("end_ids", [END]), 0, MASK, **options)
    made.take(tiny_masked() if model is None else model, 7)
    return made


@torch.no_grad()
def law(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities at every place, by the law that tokens are drawn from."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    logits[:, MASK] = -torch.inf
    return logits.log_softmax(-1)


def test_a_token_a_step_from_left_to_right_is_ancestral_sampling() -> None:
    model, prompt, length = tiny_masked(), [3, 4, 5], 6
    (ours,) = engine(model, end_ids=[MASK], block=1).generate([prompt], Sampling(max_new_tokens=length), seed=5)
    generator = torch.Generator().manual_seed(5 * 1_000_003)
    ids, logs = [*prompt, *[MASK] * length], []
    for place in range(3, 3 + length):
        log_p = law(model, ids)[place]
        ids[place] = int(drawn_from(log_p.exp()[None], generator))
        logs.append(log_p[ids[place]].item())
    assert ours.ids == ids[3:]
    assert ours.log_probs == pytest.approx(logs, abs=1e-5)


def test_its_tokens_follow_the_product_of_the_conditionals() -> None:
    model, prompt, count = tiny_masked(), [3, 4, 5], 4000
    drawn = engine(model, end_ids=[MASK], block=1, batch_size=500).generate(
        [prompt], Sampling(max_new_tokens=2, samples_per_prompt=count), seed=1
    )
    first = law(model, [*prompt, MASK, MASK])[3].exp()
    likeliest = int(first.argmax())
    joint = first[likeliest] * law(model, [*prompt, likeliest, MASK])[4].exp()
    seen = torch.bincount(torch.tensor([one.ids[1] for one in drawn if one.ids[0] == likeliest]), minlength=len(joint))
    error = (joint * (1 - joint) / count).sqrt()
    assert ((seen / count - joint).abs() <= 5 * error).all()


@pytest.mark.parametrize("order", ["confidence", "random"])
@pytest.mark.parametrize(
    ("steps", "block", "calls"), [(None, None, 6), (1, None, 1), (2, None, 2), (4, 3, 4), (1, 2, 3)]
)
def test_everything_is_filled_in_in_as_many_steps_as_asked_for(order: Any, steps: Any, block: Any, calls: int) -> None:
    model, asked = tiny_masked(), []
    model.register_forward_pre_hook(lambda *_: asked.append(1))
    made = engine(model, end_ids=[MASK], steps=steps, block=block, order=order)
    done = made.generate(PROMPTS, Sampling(max_new_tokens=6, samples_per_prompt=2), seed=0)
    assert len(asked) == calls
    assert [one.group for one in done] == [0, 0, 1, 1, 2, 2]
    for one in done:
        assert len(one.ids) == len(one.log_probs) == 6 and MASK not in one.ids
        assert all(log_prob < 0 for log_prob in one.log_probs) and one.stop == "length" and one.version == 7


def test_all_at_once_has_the_log_probabilities_of_a_text_that_is_all_hidden() -> None:
    model = tiny_masked()
    (one,) = engine(model, end_ids=[MASK], steps=1).generate([[3, 4]], Sampling(max_new_tokens=5), seed=0)
    log_p = law(model, [3, 4, *[MASK] * 5])[2:]
    expected = log_p.gather(-1, torch.tensor(one.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-5, rtol=1e-5)


def test_the_surest_places_come_first() -> None:
    model, prompt = tiny_masked(), [3, 4]
    (one,) = engine(model, end_ids=[MASK]).generate([prompt], Sampling(max_new_tokens=5, temperature=0), seed=0)
    ids = [*prompt, *[MASK] * 5]
    for _ in range(5):
        best, token = law(model, ids).max(-1)
        place = max((at for at in range(2, 7) if ids[at] == MASK), key=lambda at: best[at].item())
        ids[place] = int(token[place])
    assert one.ids == ids[2:]


def test_the_same_seed_gives_the_same_and_neither_padding_nor_a_copy_changes_what_is_likeliest() -> None:
    sampling = Sampling(max_new_tokens=6)
    drawn = [engine(order="random").generate(PROMPTS, sampling, seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = Sampling(max_new_tokens=6, temperature=0)
    together = [one.ids for one in engine().generate(PROMPTS, greedy, 0)]
    assert together == [engine(copied=True).generate([prompt], greedy, 0)[0].ids for prompt in PROMPTS]


def test_it_stops_at_the_first_end_and_skips_blocks_that_nobody_needs() -> None:
    model, asked = tiny_masked(), []
    ends = list(range(12))  # any token ends
    model.register_forward_pre_hook(lambda *_: asked.append(1))
    done = engine(model, end_ids=ends, block=2).generate(PROMPTS, Sampling(max_new_tokens=8), seed=0)
    assert [(len(one.ids), one.stop) for one in done] == [(1, "end")] * 3
    assert len(asked) == 2


def test_a_copy_keeps_its_weights_until_it_takes_others() -> None:
    student = tiny_masked()
    made, greedy = engine(student, copied=True), Sampling(max_new_tokens=6, temperature=0)
    before = made.generate(PROMPTS, greedy, 0)
    with torch.no_grad():
        for ours, other in zip(student.parameters(), tiny_masked(5).parameters(), strict=True):
            ours.copy_(other)
    assert made.generate(PROMPTS, greedy, 0) == before
    made.take(student, 8)
    assert [one.ids for one in made.generate(PROMPTS, greedy, 0)] != [one.ids for one in before]


def test_it_is_refused_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="draws from the student alone"):
        engine().generate(PROMPTS, Sampling(teacher_share=0.5), 0)
    masked, causal = RolloutSection(engine=UnmaskSection()), RolloutSection()
    check_engine(masked, masked=True)
    check_engine(causal, masked=False)
    with pytest.raises(ValueError, match="a masked language model does not write by generate: use unmask"):
        check_engine(causal, masked=True)
    with pytest.raises(ValueError, match="a causal language model does not write by unmask: use generate"):
        check_engine(masked, masked=False)
