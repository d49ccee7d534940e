"""Heads with softcap and logit scale, as real models have them, through the chunked losses."""

import pytest
import torch
import transformers

from kdlm.losses import chunked, forward_kl
from kdlm.signal import Dense, Head, Hidden

SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 127}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "head"),
    [
        (
            transformers.Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0),
            {"softcap": 2.0},
        ),
        (transformers.CohereConfig(**SIZE, logit_scale=0.25), {"logit_scale": 0.25}),
        (transformers.GraniteConfig(**SIZE, logits_scaling=8.0), {"logit_scale": 1 / 8}),
    ],
    ids=["gemma2", "cohere", "granite"],
)
def test_logits_of_the_model_and_gradients_to_it_are_those_of_its_head(draw, config, head):
    torch.manual_seed(0)
    config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    ids = torch.arange(11)[None] + 7
    out = model(input_ids=ids, output_hidden_states=True)
    weight = model.get_output_embeddings().weight
    student = Hidden(out.hidden_states[-1][0], Head(weight, **head))
    teacher = Dense(draw(11, 127))
    ours, expected = chunked(forward_kl, student, teacher, chunk_rows=3), forward_kl(out.logits[0], teacher.logits)
    torch.testing.assert_close(ours, expected)
    parameters = list(model.parameters())
    found = torch.autograd.grad(ours.sum(), parameters, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(expected.sum(), parameters), strict=True):
        torch.testing.assert_close(a, b)
