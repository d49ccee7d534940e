"""The report's figures are what was counted, its errors those of leaving prompts out, and bad questions are refused."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdlm.models import Lora, adapt
from kdlm.speculation import Block, decoding, expected_block_efficiency, measure
from kdlm.speculation.report import Counts


def model(seed: int, **sizes: int):
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=8, max_position_embeddings=32, eos_token_id=None, bos_token_id=None, **small | sizes
    )
    made = LlamaForCausalLM(config)
    made.lm_head.weight.data *= 10
    return made.eval()


@pytest.fixture(scope="module")
def pair():
    return model(0), model(1)


PROMPTS = [[1], [2, 3], [4]]


def test_a_block_counts_what_was_kept_up_to_the_first_refusal():
    for proposed, emitted, accepted, tested in (
        ((1, 2, 3), (1, 2, 3, 4), 3, 3),
        ((1, 2, 3), (1, 5), 1, 2),
        ((1, 2, 3), (4,), 0, 1),
        ((1, 2), (1, 2), 2, 2),  # the draft's last token ended the text
        ((), (4,), 0, 0),
    ):
        block = Block(proposed, emitted)
        assert (block.accepted, block.tested) == (accepted, tested)


def test_independent_tokens_give_the_geometric_sum():
    assert expected_block_efficiency(0.8, 5) == pytest.approx((1 - 0.8**6) / (1 - 0.8))
    assert expected_block_efficiency(1.0, 5) == 6
    assert expected_block_efficiency(0.0, 5) == 1


def test_the_counts_of_a_report_agree_with_each_other(pair):
    report = measure(*pair, PROMPTS, drafted=4, max_new_tokens=20, repeats=2)
    assert report.emitted == len(PROMPTS) * 2 * 20
    assert report.emitted == report.accepted + report.target_passes  # no text ended: each block adds a token of its own
    assert report.block_efficiency.value == report.emitted / report.target_passes
    assert sum(place.proposed for place in report.positions) == report.proposed
    assert sum(place.accepted for place in report.positions) == report.accepted
    assert report.accepted_share.value == report.accepted / report.proposed
    assert report.acceptance.value == report.accepted / sum(place.tested for place in report.positions)
    for before, after in zip(report.positions, report.positions[1:], strict=False):
        assert after.tested <= before.accepted <= before.tested <= before.proposed
    assert report.same_texts is None


def test_what_the_clock_says_follows_from_its_seconds(pair):
    report = measure(*pair, PROMPTS, drafted=2, max_new_tokens=8)
    assert report.tokens_per_second.value == pytest.approx(report.emitted / report.seconds)
    assert report.speedup.value == pytest.approx(report.target_seconds / report.seconds)  # equal numbers of tokens
    assert report.cost_ratio.value == pytest.approx(report.draft_seconds / report.target_seconds)
    tau, cost = report.block_efficiency.value, report.cost_ratio.value
    assert report.expected_speedup.value == pytest.approx(tau / (2 * cost + 1))


def test_the_error_of_a_mean_of_equal_texts_is_the_usual_one():
    values = [3.0, 5.0, 4.0, 9.0]
    counts = Counts([{"sum": value, "number": 1.0} for value in values])
    mean = counts.estimate(lambda sums: sums["sum"] / sums["number"])
    assert mean.value == pytest.approx(np.mean(values))
    assert mean.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))


def test_the_same_seed_gives_the_same_texts_and_the_random_state_is_put_back(pair):
    before = torch.random.get_rng_state()
    first, again, other = (
        measure(*pair, PROMPTS, drafted=3, max_new_tokens=16, seed=seed).positions for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_models_are_left_as_they_were_even_when_decoding_fails(pair):
    target, draft = pair
    draft.train()
    before = [copy.deepcopy(each.generation_config.to_dict()) for each in pair]
    with pytest.raises(RuntimeError, match="stop"), decoding(target, draft):
        assert not draft.training
        raise RuntimeError("stop")
    assert draft.training
    assert [each.generation_config.to_dict() for each in pair] == before
    assert not target._forward_pre_hooks
    draft.eval()


def test_a_draft_under_adapters_is_what_it_is_with_them_merged(pair):
    target, draft = pair
    adapted = adapt(copy.deepcopy(draft), Lora(rank=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    merged = copy.deepcopy(adapted).merge_and_unload()
    reports = [measure(target, each, PROMPTS, drafted=3, max_new_tokens=16) for each in (adapted, merged, draft)]
    assert reports[0].positions == reports[1].positions != reports[2].positions


def test_a_report_is_json_and_what_could_not_be_told_is_null(pair):
    report = measure(*pair, PROMPTS, drafted=3, max_new_tokens=1)  # room for the target's token and none proposed
    assert report.proposed == 0
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["acceptance"]["value"] is written["acceptance"]["error"] is None
    assert (written["block_efficiency"]["value"], written["block_efficiency"]["error"]) == (1.0, 0.0)
    assert len(written["positions"]) == 3


def test_the_lines_for_people_name_every_figure(pair):
    text = "\n".join(measure(*pair, PROMPTS, drafted=2, temperature=0, max_new_tokens=8).lines())
    for words in ("target passes", "acceptance", "block efficiency", "most 3", "speed-up", "equal to the target's own"):
        assert words in text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"drafted": 0}, "drafted: 0, expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"repeats": 0}, "repeats: 0"),
        ({"temperature": -0.5}, "temperature: -0.5, expected 0"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"prompts": [[1]]}, "prompts: 1, expected at least 2"),
        ({"prompts": [[1], []]}, "number 1 .* has no tokens"),
        ({"max_new_tokens": 31}, "31 after a prompt of 2 tokens do not fit the target's 32 positions"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(pair, wrong, words):
    with pytest.raises(ValueError, match=words):
        measure(*pair, **{"prompts": PROMPTS, "max_new_tokens": 8} | wrong)


def test_one_object_cannot_be_its_own_draft(pair):
    with pytest.raises(ValueError, match="load the model twice"):
        measure(pair[0], pair[0], PROMPTS, max_new_tokens=8)
