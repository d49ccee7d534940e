"""What the sandbox can build, by name. `build` is the one door to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdlm.sandbox.code_modules import CodeModules
from kdlm.sandbox.datasets import CodeCorpus, CodeTokenizer, TaskSet
from kdlm.sandbox.denoisers import ExactDenoiser, TrainedDenoiser
from kdlm.sandbox.digits_questions import DigitsQuestions
from kdlm.sandbox.entry import Entry
from kdlm.sandbox.functions import Functions
from kdlm.sandbox.image_classifier import ImageClassifier
from kdlm.sandbox.language_models import LanguageModel, PaddedModel, Shape, Training
from kdlm.sandbox.masked_language_models import ENTRIES as MASKED
from kdlm.sandbox.progress import Progress, console, silent
from kdlm.sandbox.self_supervised import DualEncoderModel, MaskedAutoencoderModel
from kdlm.sandbox.store import digest_of, finished_folder, folder_of, is_finished
from kdlm.sandbox.tool_tasks import ToolSet
from kdlm.sandbox.transformers_classifiers import TransformersClassifier
from kdlm.sandbox.vision_language import VisionLanguageModel
from kdlm.sandbox.walkers import WALKERS
from kdlm.sandbox.written import WrittenText

VERSION = 1  # raise it when a change of the code of this room changes what is built

CODE = CodeCorpus(train_chars=310_000, eval_chars=250_000)  # train is about 102k tokens of the 2k tokenizer
ARITHMETIC = TaskSet("arithmetic", train=1_000, eval=100, seed=0)  # of each level
STRINGS = TaskSet("strings", train=1_000, eval=100, seed=0)
ENTITIES = TaskSet("entities", train=1_000, eval=100, seed=0)
FUNCTIONS = Functions(tests=12, longest=4_000, seed=0)

TEACHER = Shape(width=192, layers=4, heads=4, feed_forward=512)
STUDENT = Shape(width=96, layers=2, heads=4, feed_forward=256)
TINY_TEACHER = Shape(width=64, layers=2, heads=4, feed_forward=128)
TINY_STUDENT = Shape(width=32, layers=1, heads=2, feed_forward=64)

_TEACHER_TRAINING = Training("teacher", steps=1_000, batch=4, window=128, learning_rate=3e-3)
_TINY_TRAINING = Training("train", steps=60, batch=8, window=64, learning_rate=1e-2)

_ENTRIES = (
    Entry("code", "standard library sources: teacher, train, eval", "12 M characters", 1, CODE),
    Entry("code-modules", "pieces of 8 modules, which is which", "3000 + 750 rows", 1, CodeModules()),
    Entry("arithmetic", "sums and products, worked out, 5 levels", "5000 + 500 rows", 1, ARITHMETIC),
    Entry("strings", "reverse, count, sort, shift, 5 levels", "5000 + 500 rows", 1, STRINGS),
    Entry("entities", "names of one type in a text, 5 levels", "5000 + 500 rows", 1, ENTITIES),
    Entry("tools", "calculator and store, 5 levels", "2000 + 250 rows", 1, ToolSet(train=400, eval=50, seed=0)),
    Entry("functions", "library functions to complete, with tests", "148 rows", 15, FUNCTIONS),
    Entry("code-tokenizer-2k", "of every code-* model but the tiny ones", "2048 ids", 6, CodeTokenizer(2048)),
    Entry("code-tokenizer-1k", "coarser, for pairs that do not share a tokenizer", "1024 ids", 6, CodeTokenizer(1024)),
    Entry("code-tokenizer-4k", "finer, for pairs that do not share a tokenizer", "4096 ids", 6, CodeTokenizer(4096)),
    Entry("code-tokenizer-tiny", "of the tiny models", "512 ids", 1, CodeTokenizer(512, file="train")),
    Entry("code-tokenizer-bytes", "one id per byte", "260 ids", 1, CodeTokenizer(260, "train", "bytes")),
    Entry("code-tokenizer-unigram-1k", "after SentencePiece", "1024 ids", 2, CodeTokenizer(1024, "train", "unigram")),
    Entry("code-tokenizer-spbpe-1k", "after Llama 2", "1024 ids", 1, CodeTokenizer(1024, "train", "spbpe")),
    Entry("code-tokenizer-nfkc-1k", "after XLM-R; lossy", "1024 ids", 2, CodeTokenizer(1024, "train", "nfkc")),
    Entry("code-tokenizer-wordpiece-1k", "after BERT; lossy", "1024 ids", 1, CodeTokenizer(1024, "train", "wordpiece")),
    Entry("code-tokenizer-unigram-tiny", "for tests", "448 ids", 2, CodeTokenizer(448, "train", "unigram")),
    Entry(
        "code-teacher",
        "trained on the library",
        "2.2 M parameters",
        200,
        LanguageModel("code-tokenizer-2k", TEACHER, seed=0, training=_TEACHER_TRAINING),
    ),
    Entry("code-student", "not trained", "0.4 M parameters", 1, LanguageModel("code-tokenizer-2k", STUDENT, seed=0)),
    Entry(
        "code-teacher-4k",
        "code-teacher on the finer tokenizer",
        "2.6 M parameters",
        150,
        LanguageModel("code-tokenizer-4k", TEACHER, seed=0, training=_TEACHER_TRAINING),
    ),
    Entry("code-student-4k", "not trained", "0.6 M parameters", 1, LanguageModel("code-tokenizer-4k", STUDENT, seed=0)),
    Entry(
        "code-student-unigram",
        "not trained, reads another tokenizer than its teachers",
        "0.32 M parameters",
        1,
        LanguageModel("code-tokenizer-unigram-1k", STUDENT, seed=0, positions=2048),
    ),
    Entry(
        "code-student-bytes",
        "not trained, reads bytes",
        "0.25 M parameters",
        1,
        LanguageModel("code-tokenizer-bytes", STUDENT, seed=0, positions=4096),
    ),
    Entry(
        "code-written",
        "text sampled from code-teacher-4k",
        "310 k characters",
        27,
        WrittenText("code-teacher-4k", chars=310_000, seed=0),
    ),
    Entry(
        "code-teacher-padded",
        "code-teacher with 128 rows of noise in its head",
        "2176 rows",
        1,
        PaddedModel("code-teacher", rows=2176, seed=0),
    ),
    Entry(
        "code-teacher-tiny",
        "for tests",
        "0.1 M parameters",
        13,
        LanguageModel("code-tokenizer-tiny", TINY_TEACHER, seed=0, training=_TINY_TRAINING),
    ),
    Entry(
        "code-student-tiny",
        "for tests, not trained",
        "0.03 M parameters",
        1,
        LanguageModel("code-tokenizer-tiny", TINY_STUDENT, seed=0),
    ),
    Entry(
        "code-student-tiny-unigram",
        "for tests, not trained, reads another tokenizer than code-teacher-tiny",
        "0.02 M parameters",
        1,
        LanguageModel("code-tokenizer-unigram-tiny", TINY_STUDENT, seed=0, positions=2048),
    ),
    Entry(
        "code-student-tiny-bytes",
        "for tests, not trained, reads bytes",
        "0.02 M parameters",
        1,
        LanguageModel("code-tokenizer-bytes", TINY_STUDENT, seed=0, positions=4096),
    ),
    Entry(
        "code-teacher-tiny-padded",
        "for tests: code-teacher-tiny with 32 rows of noise in its head",
        "544 rows",
        1,
        PaddedModel("code-teacher-tiny", rows=544, seed=0),
    ),
    Entry(
        "digits-denoiser",
        "of the digits, by class",
        "0.3 M parameters",
        35,
        TrainedDenoiser("digits", width=128, depth=3, steps=4_000),
    ),
    Entry("ring-denoiser", "of the ring", "0.2 M parameters", 15, TrainedDenoiser("ring", 128, 3, steps=2_000)),
    Entry("ring-exact", "the ring's own posterior mean", "8 modes", 1, ExactDenoiser()),
    Entry(
        "digits-classifier",
        "of the 8 x 8 digits; its features measure generated ones",
        "0.02 M parameters",
        2,
        ImageClassifier(width=32, epochs=40, batch=64, learning_rate=3e-3, seed=0),
    ),
    Entry(
        "digits-resnet",
        "a convolutional teacher of the digits",
        "0.07 M parameters",
        3,
        TransformersClassifier(
            "resnet",
            {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"},
            epochs=30,
            learning_rate=1e-2,
        ),
    ),
    Entry(
        "digits-vit",
        "a transformer of 16 patches as their teacher",
        "0.06 M parameters",
        16,
        TransformersClassifier(
            "vit",
            {
                "image_size": 8,
                "patch_size": 2,
                "hidden_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 3,
                "intermediate_size": 96,
            },
            epochs=50,
            learning_rate=3e-3,
        ),
    ),
    Entry(
        "digits-clip",
        "embeds the digits and captions of them in one space",
        "0.06 M parameters",
        20,
        DualEncoderModel(
            vision={"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96},
            text={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
            embedding=32,
            steps=700,
            learning_rate=3e-3,
        ),
    ),
    Entry(
        "digits-mae",
        "a masked autoencoder of the digits",
        "0.11 M parameters",
        72,
        MaskedAutoencoderModel(
            {
                "hidden_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 128,
                "decoder_hidden_size": 32,
                "decoder_num_hidden_layers": 1,
                "decoder_num_attention_heads": 2,
                "decoder_intermediate_size": 64,
                "initializer_range": 0.08,  # at the usual 0.02 so small a net hardly begins
            },
            steps=2400,
            learning_rate=4e-3,
        ),
    ),
    Entry("digits-questions", "three questions about every digit, in words", "4314 + 1077 rows", 1, DigitsQuestions()),
    Entry(
        "digits-vlm-teacher",
        "a LLaVA that answers digits-questions",
        "0.2 M parameters",
        60,
        VisionLanguageModel(width=64, layers=2, heads=4, patch=2, seed=0, steps=1_800),
    ),
    Entry(
        "digits-vlm-student",
        "a smaller LLaVA, not trained",
        "0.02 M parameters",
        1,
        VisionLanguageModel(width=32, layers=1, heads=2, patch=2, seed=1),
    ),
    *(Entry(*entry) for entry in MASKED),
    *WALKERS,
)
CATALOG: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def names() -> tuple[Entry, ...]:
    """Return everything that `build` can make, with a line of description, size and build time."""
    return _ENTRIES


def build(name: str, *, cache: Path | None = None, progress: Progress | None = console) -> Path:
    """Return the finished folder of a sandbox model, tokenizer or dataset, building it and its needs when missing.

    A language model's or tokenizer's folder opens with `from_pretrained`; a dataset's holds jsonl files. Folders are
    kept in `cache` (default $KDLM_CACHE, else ~/.cache/kdlm) under the content hash of everything that determines
    them. Several processes may ask at once: one builds. `progress` None is silent.

    Raises ValueError for an unknown name.
    """
    spec = _entry(name).spec
    show = progress or silent

    def make(folder: Path) -> dict[str, Any]:
        built = {other: build(other, cache=cache, progress=progress) for other in spec.needs}
        return spec.make(folder, built, show, name)

    return finished_folder(name, _ingredients(name), make, cache=cache, progress=show)


def is_built(name: str, *, cache: Path | None = None) -> bool:
    """Say whether `build` would find the folder finished. Raises ValueError for an unknown name."""
    return is_finished(folder_of(name, _ingredients(name), cache))


def _ingredients(name: str) -> dict[str, Any]:
    """Everything that determines a folder: its spec, the digests of what it needs, the version of this code."""
    spec = _entry(name).spec
    needs = {other: digest_of(_ingredients(other)) for other in spec.needs}
    return {"kind": type(spec).__name__, "spec": spec.ingredients(), "needs": needs, "version": VERSION}


def _entry(name: str) -> Entry:
    if name not in CATALOG:
        from difflib import get_close_matches

        close = get_close_matches(name, CATALOG, n=1)
        hint = f", did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"the sandbox has no {name!r}{hint} It has: {', '.join(CATALOG)}")
    return CATALOG[name]
