"""Captions of the digits, and their tokenizer of words."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of a {}", "the digit {}", "a {} written by hand")
PAD, EOS = "<pad>", "<eos>"  # ids 0 and 1; CLIP reads a text where its end is, and takes 2 for another thing
WORDS = (PAD, EOS, *dict.fromkeys(word for text in (*TEMPLATES, *NAMES) for word in text.replace("{}", "").split()))
LENGTH = 1 + max(len(template.split()) for template in TEMPLATES)


def captions() -> list[list[str]]:
    """Return the captions of each digit, one for each template."""
    return [[template.format(name) for template in TEMPLATES] for name in NAMES]


def caption_ids() -> Int[Tensor, "digits templates length"]:
    """Return the captions as token ids, ended by `<eos>` and padded by 0."""
    number = {word: index for index, word in enumerate(WORDS)}
    ids = torch.zeros(len(NAMES), len(TEMPLATES), LENGTH, dtype=torch.int64)
    for digit, texts in enumerate(captions()):
        for template, text in enumerate(texts):
            row = [number[word] for word in (*text.split(), EOS)]
            ids[digit, template, : len(row)] = torch.tensor(row)
    return ids


def caption_tokenizer() -> "PreTrainedTokenizerFast":
    """Return the tokenizer of the captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=PAD)
