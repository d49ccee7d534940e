"""Tokenizers trained on the spot: what they have beside their pieces, and how they are written."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EOS, PAD, TURN_START, TURN_END = "<eos>", "<pad>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (EOS, PAD, TURN_START, TURN_END)  # ids 0 to 3 in every tokenizer that is not after SentencePiece

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ROLES_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

INSTRUCTION_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}"
    "{% else %}{{ '[INST]' + message['content'] + '[/INST]' }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Markup:
    """What a tokenizer has beside its pieces.

    Attributes:
        special: the special tokens in the order of their ids, from 0.
        names: which of them is the `eos_token`, `pad_token`, `bos_token`, `unk_token` of transformers.
        chat_template: writes a conversation with them.
    """

    special: tuple[str, ...]
    names: dict[str, str]
    chat_template: str


TURNS = Markup(SPECIAL_TOKENS, {"eos_token": EOS, "pad_token": PAD}, CHAT_TEMPLATE)
TURNS_AND_UNKNOWN = Markup((*SPECIAL_TOKENS, "[UNK]"), {**TURNS.names, "unk_token": "[UNK]"}, CHAT_TEMPLATE)
ROLES = Markup(
    ("<pad>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"),
    {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    ROLES_TEMPLATE,
)
INSTRUCTIONS = Markup(
    ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"),
    {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>"},
    INSTRUCTION_TEMPLATE,
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path, kind: str = "bpe") -> None:
    """Train a tokenizer of exactly `vocab_size` ids and write it as a Hugging Face tokenizer folder.

    `kind` is a key of `KINDS` in `tokenizer_kinds.py`. Digits are tokens of their own, so that arithmetic is readable
    to a small model. Raises ValueError when the texts are too few for so many ids.
    """
    from kdlm.sandbox.tokenizer_kinds import KINDS

    markup, train = KINDS[kind]
    tokenizer = train(texts, vocab_size, markup)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts gave {tokenizer.get_vocab_size()} tokens, {vocab_size} were asked for")
    _write(tokenizer, markup, folder)


def _write(tokenizer: Any, markup: Markup, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **markup.names,
        additional_special_tokens=[token for token in markup.special if token not in markup.names.values()],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = markup.chat_template
    wrapped.save_pretrained(folder)
