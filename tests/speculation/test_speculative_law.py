"""Speculative decoding writes what the target would have written, whatever the draft, and keeps as much as 1 - TVD."""

import copy
import math
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kdlm.speculation import Decoded, decoding, measure

VOCAB = 8
PROMPT = (1, 2, 3)
BOUND = 1e-3
"""Seeds are fixed, so a p-value below it is either the one draw in a thousand, found once, or a wrong law."""


def model(seed: int, *, vocab: int = VOCAB, layers: int = 1, sharpness: float = 40.0, eos: int | None = None):
    """Return a small Llama whose next token depends on all before it and is neither certain nor uniform."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    made = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, num_hidden_layers=layers, bos_token_id=None, eos_token_id=eos, **sizes)
    )
    made.lm_head.weight.data *= sharpness
    return made.eval()


@pytest.fixture(scope="module")
def target():
    return model(0, layers=2)


def nudged(model, amount: float = 0.5):
    """Return a model of almost the same mind: a draft that is right often and wrong often."""
    torch.manual_seed(1)
    made = copy.deepcopy(model)
    for parameter in made.parameters():
        parameter.data += amount * parameter.data.std(correction=0) * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def draft(target):
    return nudged(target)


@torch.no_grad()
def law(model, texts: list[tuple[int, ...]], temperature: float) -> Tensor:
    """Return the probability of each token of each text (all of one length) at every place: [texts, places, vocab]."""
    logits = model(input_ids=torch.tensor([[*PROMPT, *text] for text in texts])).logits
    return (logits[:, len(PROMPT) - 1 : -1].double() / temperature).softmax(-1)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Return the p-value of counts under a law; cells where fewer than five are expected count as one."""
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = expected > 0
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = (keep.sum() - 1).double()
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def drawn(target, draft, temperature: float, *, number: int, length: int, drafted: int) -> list[Decoded]:
    torch.manual_seed(0)
    with decoding(target, draft, drafted=drafted, temperature=temperature) as decoder:
        return [decoder.speculative(PROMPT, length) for _ in range(number)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_texts_have_the_targets_law_and_not_the_drafts(target, draft, temperature):
    length, number = 3, 500
    outcomes = list(product(range(VOCAB), repeat=length))
    texts = [tuple(text.ids) for text in drawn(target, draft, temperature, number=number, length=length, drafted=2)]
    counts = torch.zeros(len(outcomes), dtype=torch.double)
    for text in texts:
        counts[outcomes.index(text)] += 1
    of = {}
    for name, each in (("target", target), ("draft", draft)):
        steps = law(each, outcomes, temperature).gather(2, torch.tensor(outcomes)[..., None]).squeeze(2)
        of[name] = chi_square(counts, number * steps.prod(1))
    assert of["target"] > BOUND
    assert of["draft"] < 1e-9  # the test can tell them apart


def quantiles(target, text: list[int], temperature: float) -> Tensor:
    """Return where each token falls in the target's law of it: independent and uniform if that is how it was drawn.

    The jump that a token makes in the distribution function is filled at random (Rosenblatt's transform of a discrete
    law), so this holds for a text of any length over any vocabulary.
    """
    steps = law(target, [tuple(text)], temperature)[0]
    below = steps.cumsum(-1).gather(1, torch.tensor(text)[:, None]).squeeze(1)
    jump = steps.gather(1, torch.tensor(text)[:, None]).squeeze(1)
    return below - torch.rand(len(text), dtype=torch.double) * jump


def fits(target, texts: list[list[int]], temperature: float, bins: int = 20) -> float:
    places = torch.cat([quantiles(target, text, temperature) for text in texts])
    counts = torch.histc(places, bins, 0, 1)
    return chi_square(counts, torch.full((bins,), len(places) / bins, dtype=torch.double))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_long_texts_have_the_targets_law_token_by_token(target, draft, temperature):
    texts = [text.ids for text in drawn(target, draft, temperature, number=4, length=200, drafted=4)]
    assert fits(target, texts, temperature) > BOUND
    assert fits(draft, texts, temperature) < 1e-9


def test_a_draft_of_uniform_tokens_leaves_the_law_alone(target, draft):
    uniform = copy.deepcopy(draft)
    uniform.lm_head.weight.data.zero_()
    texts = drawn(target, uniform, 1.0, number=4, length=200, drafted=3)
    assert fits(target, [text.ids for text in texts], 1.0) > BOUND
    proposed = torch.tensor([token for text in texts for block in text.blocks for token in block.proposed])
    counts = torch.bincount(proposed, minlength=VOCAB).double()
    assert chi_square(counts, torch.full((VOCAB,), len(proposed) / VOCAB, dtype=torch.double)) > BOUND


def states_that_were_up(text: Decoded) -> list[tuple[list[int], bool]]:
    """Return what stood before each proposal that was up, and whether it was kept."""
    states, so_far = [], []
    for block in text.blocks:
        for place in range(block.tested):
            states.append(([*so_far, *block.proposed[:place]], place < block.accepted))
        so_far += block.emitted
    return states


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_acceptance_is_one_minus_the_total_variation_of_the_visited_states(target, draft, temperature):
    kept, expected = [], []
    for text in drawn(target, draft, temperature, number=5, length=200, drafted=4):
        p, q = (law(each, [tuple(text.ids)], temperature)[0] for each in (target, draft))
        for state, accepted in states_that_were_up(text):
            assert state == text.ids[: len(state)]
            kept.append(accepted)
            expected.append(float(torch.minimum(p[len(state)], q[len(state)]).sum()))
    rates = torch.tensor(expected)
    error = math.sqrt(float((rates * (1 - rates)).sum())) / len(rates)
    assert 0.3 < sum(kept) / len(kept) < 0.9
    assert abs(sum(kept) / len(kept) - float(rates.mean())) < 3.3 * error


@pytest.mark.parametrize("drafted", [1, 3, 5])
def test_greedy_texts_are_those_of_the_target_to_the_letter(target, drafted):
    prompts = [[i, j] for i in range(VOCAB) for j in (0, 5)]
    report = measure(target, nudged(target, 0.8), prompts, drafted=drafted, temperature=0, max_new_tokens=20)
    assert report.same_texts == len(prompts)
    assert 0 < report.accepted < report.proposed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_the_target_fills_every_block(target, temperature):
    report = measure(
        target, copy.deepcopy(target), [[1], [2], [3]], drafted=3, temperature=temperature, max_new_tokens=16
    )
    assert (report.proposed, report.accepted, report.target_passes) == (36, 36, 12)
    assert report.acceptance.value == report.accepted_share.value == 1
    assert report.block_efficiency.value == report.expected_block_efficiency.value == 4


def test_texts_end_where_the_target_ends_them():
    target = model(0, layers=2, eos=5)
    texts = drawn(target, nudged(target), 1.0, number=60, length=12, drafted=4)
    assert all(5 not in text.ids[:-1] for text in texts)
    ended = [text for text in texts if len(text.ids) < 12]
    assert len(ended) > 10
    assert all(text.ids[-1] == 5 for text in ended)
    last = [text.blocks[-1] for text in ended]
    assert any(block.accepted == len(block.emitted) for block in last)  # an end that the draft proposed counts as kept
    assert all(sum(len(block.emitted) for block in text.blocks) == len(text.ids) for text in texts)


@pytest.mark.parametrize("rows", [(8, 11), (11, 8)])
def test_heads_of_different_size_are_cut_to_the_ids_both_have(rows):
    target, draft = model(0, vocab=rows[0], layers=2), model(1, vocab=rows[1])
    texts = drawn(target, draft, 1.0, number=3, length=100, drafted=3)
    assert max(token for text in texts for token in text.ids) < 8
    cut = copy.deepcopy(target)
    cut.lm_head.weight.data = cut.lm_head.weight.data[:8]
    assert fits(cut, [text.ids for text in texts], 1.0) > BOUND
    assert [each.config.vocab_size for each in (target, draft)] == list(rows)


def test_settings_in_the_models_folders_do_not_change_the_law(target, draft):
    target, draft = copy.deepcopy(target), copy.deepcopy(draft)
    torch.manual_seed(1)
    expected = [text.ids for text in drawn(target, draft, 1.0, number=4, length=20, drafted=3)]
    for each in (target, draft):
        each.generation_config.update(do_sample=True, top_k=2, top_p=0.5, temperature=0.1, repetition_penalty=2.0)
        each.generation_config.update(num_assistant_tokens=9, assistant_confidence_threshold=0.9)
    before = [each.generation_config.to_dict() for each in (target, draft)]
    assert [text.ids for text in drawn(target, draft, 1.0, number=4, length=20, drafted=3)] == expected
    assert [each.generation_config.to_dict() for each in (target, draft)] == before


def test_a_sliding_window_is_rolled_back_like_any_cache():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(
        vocab_size=VOCAB,
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=6,
        use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"],
        eos_token_id=None,
        **sizes,
    )
    target = Qwen3ForCausalLM(config)
    target.lm_head.weight.data *= 60
    report = measure(target, model(1), [[1], [2, 3], [4]], temperature=0, max_new_tokens=40, drafted=4)
    assert report.same_texts == 3
