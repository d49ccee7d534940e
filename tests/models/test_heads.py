"""The head of a checkpoint, read without its body."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, LlamaConfig

from kdlm.models import Pretrained, Sandbox, read_head
from kdlm.models.prediction import head

SMALL = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "softcap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0),
    "scale": CohereConfig(**SMALL, logit_scale=0.25),
}


@pytest.mark.parametrize("size", ["1GB", "4KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_the_head_of_the_whole_model(tmp_path: Path, kind: str, size: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    model.save_pretrained(tmp_path, max_shard_size=size)
    found, whole = read_head(Pretrained(path=str(tmp_path))), head(model)
    assert torch.equal(found.weight, whole.weight) and found.bias is None
    assert (found.logit_scale, found.softcap) == (whole.logit_scale, whole.softcap)


def test_its_dtype_is_what_the_source_asks_for() -> None:
    assert read_head(Sandbox(model="code-teacher-tiny", dtype="bfloat16")).weight.dtype == torch.bfloat16


def test_a_checkpoint_without_it_is_named(tmp_path: Path) -> None:
    CONFIGS["untied"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no safetensors file of it has lm_head\.weight"):
        read_head(Pretrained(path=str(tmp_path)))
