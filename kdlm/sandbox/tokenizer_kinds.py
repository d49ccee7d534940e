"""The kinds of tokenizer that models come with, each trained as its family does it, small.

| kind | after | any text survives `decode(encode(text))` |
|---|---|---|
| `bpe` | GPT-2's byte-level BPE | yes |
| `bytes` | ByT5: one id per byte | yes |
| `unigram` | SentencePiece's unigram model with byte fallback | yes, but for U+2581 and beside special tokens |
| `spbpe` | Llama 2: SentencePiece's BPE with byte fallback, `<s>` before every text | likewise |
| `nfkc` | XLM-R: SentencePiece's unigram model of NFKC text, without bytes | what NFKC keeps, of known letters |
| `wordpiece` | BERT, uncased | no: letters are lowered, accents and white space lost |

SentencePiece writes a space as U+2581, so a text that has this letter comes back with spaces, and puts one space before
the text that decoding takes away again; the fast tokenizers put one after every special token too, and there it stays.
`nfkc` puts none where the text begins with a space, which decoding then eats.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kdlm.sandbox.tokenizer import INSTRUCTIONS, ROLES, TURNS, TURNS_AND_UNKNOWN, Markup

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # how the models of `tokenizers` know the bytes they fall back on
LETTERS = [SPACE, "\n", "\t", *map(chr, range(33, 127))]  # what else is written is spelled in bytes
ACCENTED = [*map(chr, range(0xC0, 0x100))]

# Lines, digits, words with the space before them, and the rest of the white space before a word
WORDS = pre_tokenizers.Split(Regex(rf"\n+|\d|{SPACE}+(?={SPACE})|{SPACE}?[^{SPACE}\n\d]+"), "isolated")

NEVER = -1_000.0  # the score of a piece that is not to be found in a text: `<0x41>` is not the letter A


def _train_bpe(texts: Iterable[str], vocab_size: int, markup: Markup) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(markup.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _byte_level(texts: Iterable[str], vocab_size: int, markup: Markup) -> Any:
    """Nothing is trained: byte b has the id b after the special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = [letter for _, letter in sorted(bytes_to_unicode().items())]  # that GPT-2 writes the bytes 0 to 255 with
    vocabulary = {token: number for number, token in enumerate([*markup.special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_unigram(texts: Iterable[str], vocab_size: int, markup: Markup) -> Any:
    kept = [*markup.special, *BYTES]
    tokenizer = _sentencepiece(Tokenizer(models.Unigram()))
    tokenizer.pre_tokenizer = WORDS
    pieces = _unigram_pieces(tokenizer, map(_ascii, texts), vocab_size - len(kept), LETTERS)
    vocabulary = [(token, NEVER) for token in kept] + pieces
    tokenizer.model = models.Unigram(vocabulary, unk_id=markup.special.index("<unk>"), byte_fallback=True)
    return tokenizer


def _train_sentencepiece_bpe(texts: Iterable[str], vocab_size: int, markup: Markup) -> Any:
    kept = [*markup.special, *BYTES]
    tokenizer = _sentencepiece(Tokenizer(models.BPE()))
    tokenizer.pre_tokenizer = WORDS
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(kept), initial_alphabet=LETTERS, max_token_length=16, show_progress=False
    )
    tokenizer.train_from_iterator(map(_ascii, texts), trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].get)
    tokenizer.model = models.BPE(
        vocab={token: number for number, token in enumerate([*kept, *pieces])},
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer.pre_tokenizer = None  # as in Llama 2: what merges is decided by the merges alone
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", markup.special.index("<s>"))]
    )
    return tokenizer


def _train_nfkc(texts: Iterable[str], vocab_size: int, markup: Markup) -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([metaspace, pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    pieces = _unigram_pieces(tokenizer, texts, vocab_size - len(markup.special), LETTERS + ACCENTED)
    vocabulary = [(token, NEVER) for token in markup.special] + pieces
    tokenizer.model = models.Unigram(vocabulary, unk_id=markup.special.index("<unk>"))
    return tokenizer


def _train_wordpiece(texts: Iterable[str], vocab_size: int, markup: Markup) -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(markup.special), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    pieces = sorted(set(tokenizer.get_vocab()) - set(markup.special))  # trained in another order in every run
    vocabulary = {token: number for number, token in enumerate([*markup.special, *pieces])}
    tokenizer.model = models.WordPiece(vocab=vocabulary, unk_token="[UNK]")
    return tokenizer


def _sentencepiece(tokenizer: Any) -> Any:
    """With one space before the text, spaces that are letters, and the bytes of what is not in the vocabulary."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _unigram_pieces(tokenizer: Any, texts: Iterable[str], count: int, letters: list[str]) -> list[tuple[str, float]]:
    """The trained pieces and their scores, the likely ones first.

    Letters that no text has come out 1e-4 apart, and equal scores in an order, both other in every run: here the former
    share one score, and the latter go by their letters.
    """
    trainer = trainers.UnigramTrainer(
        vocab_size=count, special_tokens=[], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    lowest = min(score for _, score in pieces)
    steady = [(piece, round(lowest if score < lowest + 0.01 else score, 4)) for piece, score in pieces]
    return sorted(steady, key=lambda piece: (-piece[1], piece[0]))


def _ascii(text: str) -> str:
    return text.encode("ascii", "ignore").decode()


KINDS: dict[str, tuple[Markup, Callable[[Iterable[str], int, Markup], Any]]] = {
    "bpe": (TURNS, _train_bpe),
    "bytes": (TURNS, _byte_level),
    "unigram": (ROLES, _train_unigram),
    "spbpe": (INSTRUCTIONS, _train_sentencepiece_bpe),
    "nfkc": (ROLES, _train_nfkc),
    "wordpiece": (TURNS_AND_UNKNOWN, _train_wordpiece),
}
