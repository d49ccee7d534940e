"""What a student writes, in figures: errors over prompts, the student left alone."""

import pytest
import torch

from kdlm.estimates import mean
from kdlm.measuring import measure_generations
from kdlm.quality import text_figures
from kdlm.rollouts import GenerateSection, Sampling

PROMPTS = [[5, 9, 13], [21, 8], [40, 41, 42, 43]]


def test_figures_are_those_of_what_the_engine_writes(student, tokenizer):
    sampling = Sampling(max_new_tokens=12, samples_per_prompt=2)
    before = torch.get_rng_state()
    found = measure_generations(student, tokenizer, PROMPTS, sampling=sampling, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    engine = GenerateSection(batch_size=16).build(student, tokenizer, student.device, copied=False)
    engine.take(student, 0)
    written = engine.generate(PROMPTS, sampling, 3)
    right = text_figures([one.ids for one in written], [one.stop == "length" for one in written])
    assert {name: figure["value"] for name, figure in found["metrics"].items()} == pytest.approx(right)
    assert (found["prompts"], found["completions"]) == (3, 6)
    lengths = [sum(len(one.ids) for one in written if one.group == group) / 2 for group in range(3)]
    assert found["metrics"]["length"]["error"] == pytest.approx(mean(lengths).error)
    assert found["metrics"]["distinct_2"]["error"] is None
    assert measure_generations(student, tokenizer, PROMPTS, sampling=sampling, seed=3) == found


def test_no_prompts_are_refused(student, tokenizer):
    with pytest.raises(ValueError, match="prompts: there are none"):
        measure_generations(student, tokenizer, [])
