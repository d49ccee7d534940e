"""Model folders of a few kilobytes, with tokenizers trained on the spot."""

import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from kdlm.sandbox import build

TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps on, 123 times"


def tiny_folder(path: Path, *, text: str = TEXT, vocab: int = 270, width: int = 16, layers: int = 1) -> str:
    """Write config and tokenizer of a small Llama, no weights, and return the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text] * 50, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(path)
    return _configured(path, vocab, width, layers)


def sandbox_folder(path: Path, kind: str) -> str:
    """The same around a tokenizer of the sandbox."""
    shutil.copytree(build(f"code-tokenizer-{kind}", progress=None), path, dirs_exist_ok=True)
    return _configured(path, len(AutoTokenizer.from_pretrained(path)), width=32 if path.name == "teacher" else 16)


def _configured(path: Path, vocab: int, width: int, layers: int = 1) -> str:
    LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)
    return str(path)
