"""Distributions compared across tokenizers, in the trainer: one step's weights say what its gradient was."""

from typing import Any

import pytest
import torch
from readers import reader
from tiny_models import tiny_model
from two_tokenizers import TEXTS, own_rows

from kdlm import DistillTrainer
from kdlm.data.load import text_collator
from kdlm.losses import JSD, CrossEntropy, ForwardKL
from kdlm.methods import GOLD, ULD, ByteKD, LogitKD, SharedVocabularyKD, VocabularyProjection

BPE, UNIGRAM, BYTES = "tiny", "unigram-tiny", "bytes"
METHODS = {
    "uld": lambda: ULD([CrossEntropy(weight=0.1)]),
    "uld_chunks": lambda: ULD(pairing="chunks", top_k=7),
    "gold": lambda: GOLD([CrossEntropy(weight=0.1)]),
    "gold_bayesian": lambda: GOLD(merge="bayesian"),
    "shared": lambda: SharedVocabularyKD([ForwardKL(temperature=2.0), CrossEntropy(weight=0.1)]),
    "projection": lambda: VocabularyProjection([ForwardKL()]),
    "projection_turned": lambda: VocabularyProjection([ForwardKL()], onto="student"),
    "byte_kd": lambda: ByteKD([ForwardKL(temperature=2.0), CrossEntropy(weight=0.1)]),
}
STUDENTS = {"byte_kd": BYTES}
PLAIN = {
    "gold": (lambda: GOLD(skip_eos=False), [JSD()]),
    "gold_bayesian": (lambda: GOLD(merge="bayesian", skip_eos=False), [JSD()]),
    "shared": (lambda: SharedVocabularyKD([ForwardKL(temperature=2.0)]), [ForwardKL(temperature=2.0)]),
    "projection": (lambda: VocabularyProjection([ForwardKL(temperature=2.0)]), [ForwardKL(temperature=2.0)]),
}


def trained(arguments, method, ours: str = UNIGRAM, theirs: str | None = BPE, layout: Any = None, **options) -> dict:
    """Train one SGD step in float64 and return the student's weights."""
    size = {BPE: 512, UNIGRAM: 448, BYTES: 260}
    student = tiny_model(1, vocab=size[ours]).double()
    teacher = tiny_model(2, hidden=24, layers=3, vocab=size[theirs or ours] + 16).double()
    reading = reader(theirs) if theirs else None
    trainer = DistillTrainer(
        student,
        teacher,
        arguments(**options),
        method=method,
        train_dataset=own_rows(ours, TEXTS[:6]),
        processing_class=reader(ours),
        teacher_processing_class=reading,
        data_collator=None if layout is None else text_collator(layout, reader(ours), reading),
    )
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.student.named_parameters()}


def assert_same(ours: dict, other: dict) -> None:
    start = dict(tiny_model(1, vocab=len(ours["model.embed_tokens.weight"])).double().named_parameters())
    assert max((ours[name] - start[name]).abs().max() for name in ours) > 1e-4, "the step moved nothing"
    for name, weight in ours.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_how_rows_are_cut_into_batches_and_laid_out_does_not_show(arguments, name: str) -> None:
    ours = STUDENTS.get(name, UNIGRAM)
    whole = trained(arguments, METHODS[name](), ours, per_device_train_batch_size=6)
    apart = {"layout": "padding_free", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert_same(whole, trained(arguments, METHODS[name](), ours, **apart))


@pytest.mark.parametrize("name", PLAIN)
def test_with_one_tokenizer_the_step_is_that_of_the_plain_loss(arguments, name: str) -> None:
    """The teacher's head is padded, as heads are; what is plain is cut to the tokens."""
    method, losses = PLAIN[name]
    assert_same(
        trained(arguments, method(), BPE, BPE, per_device_train_batch_size=6),
        trained(arguments, LogitKD(losses, vocab=512), BPE, None, per_device_train_batch_size=6),
    )
