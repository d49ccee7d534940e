"""What acceptance measured on text foretells is what speculative decoding does."""

import copy
import math

from kdlm.measuring import measure
from kdlm.rollouts import GenerateSection, Sampling
from kdlm.signal import IGNORE_INDEX
from kdlm.speculation import measure as decode

PROMPTS = [[5 + n, 40 + 3 * n, 90 + n] for n in range(16)]


def test_expected_acceptance_and_block_efficiency_are_those_of_decoding(student, teacher, tokenizer):
    """Speculative decoding writes the teacher's own text, so acceptance is measured on what the teacher writes."""
    draft, target = (copy.deepcopy(model).float() for model in (student, teacher))
    engine = GenerateSection(batch_size=32).build(target, tokenizer, target.device, copied=False)
    engine.take(target, 0)
    written = engine.generate(PROMPTS, Sampling(max_new_tokens=32, samples_per_prompt=2), 0)
    rows = [
        {"input_ids": [*PROMPTS[one.group], *one.ids], "labels": [*[IGNORE_INDEX] * 3, *one.ids]} for one in written
    ]
    expected = measure(draft, target, rows, tokenizer, drafted=3)["metrics"]
    done = decode(target, draft, PROMPTS, drafted=3, max_new_tokens=32)
    for name, found in (("acceptance_rate", done.acceptance), ("block_efficiency", done.block_efficiency)):
        error = math.hypot(expected[name]["error"], found.error)
        assert error < 0.1 and abs(expected[name]["value"] - found.value) < 4 * error, name
