"""Teachers that say less, read the text in other tokens, or see images: what can be measured is, the rest is noted."""

import math

import pytest
import torch
from readers import reader
from tiny_vlm import rendered, tiny_vlm
from transformers import LlamaConfig, LlamaForCausalLM
from two_tokenizers import pair_collator, paired_rows

from kdlm.data.image_collate import ImageTextCollator
from kdlm.measuring import measure
from kdlm.sandbox.vision_language import processor
from kdlm.signal import LogProbs, Sampled, TopK
from kdlm.spelling import spelling_of
from kdlm.teachers import LocalTeacher


class Telling:
    """A teacher that makes something else of another one's logits."""

    provides = frozenset({"teacher"})

    def __init__(self, model, tell):
        self.inner, self.tell = LocalTeacher(model, "dense"), tell

    def __call__(self, batch, rows):
        return self.tell(self.inner(batch, rows).logits.log_softmax(-1), rows)


def few(count):
    def tell(log_p, rows):
        values, ids = log_p.topk(count)
        return TopK(ids, values)

    return tell


def tiny(seed, vocab):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double()


def values(measured):
    return {name: figure["value"] for name, figure in measured["metrics"].items()}


@pytest.fixture
def rows(load):
    return load().train.select(range(8))


def test_a_teacher_that_gives_a_few_tokens_is_compared_by_buckets(student, teacher, rows, tokenizer):
    whole = values(measure(student, teacher, rows, tokenizer))
    found = measure(student, Telling(teacher, few(6)), rows, tokenizer)
    less = values(found)
    assert less["kl_to_teacher"] < whole["kl_to_teacher"] and less["block_efficiency"] > whole["block_efficiency"]
    for name in ("top1_agreement", "top5_agreement", "teacher_ece", "cross_entropy"):
        assert less[name] == pytest.approx(whole[name])
    assert not {"teacher_cross_entropy", "teacher_perplexity", "teacher_brier", "gap_closed"} & set(less)
    assert found["notes"] == []
    fewer = measure(student, Telling(teacher, few(3)), rows, tokenizer)
    assert "top5_agreement" not in fewer["metrics"]
    assert fewer["notes"] == ["top5_agreement: the teacher gives 3 tokens at each place"]


def test_a_teacher_without_distributions_leaves_what_it_knows(student, teacher, rows, tokenizer):
    whole = values(measure(student, teacher, rows, tokenizer))

    def own(log_p, kept):
        return LogProbs(log_p.gather(-1, kept.labels[:, None]).squeeze(-1))

    found = values(measure(student, Telling(teacher, own), rows, tokenizer))
    for name in ("teacher_cross_entropy", "teacher_bits_per_byte", "cross_entropy", "ece"):
        assert found[name] == pytest.approx(whole[name])
    assert "kl_to_teacher" not in found

    def drawn(log_p, kept):
        ids = log_p.topk(2).indices
        return Sampled(ids, torch.ones(ids.shape))

    nothing = measure(student, Telling(teacher, drawn), rows, tokenizer, names=["accuracy", "kl_to_teacher"])
    assert set(nothing["metrics"]) == {"accuracy"} and "no distribution" in nothing["notes"][0]


def test_what_a_teacher_reads_ahead_it_finds_in_the_batch(student, teacher, rows, tokenizer):
    class Reading(Telling):
        def prefetch(self, batch):
            return {"sums": batch["input_ids"].sum(-1)}

        def __call__(self, batch, kept):
            assert torch.equal(batch.pop("teacher")["sums"], batch["input_ids"].sum(-1))
            return super().__call__(batch, kept)

    found = measure(student, Reading(teacher, few(6)), rows, tokenizer, batch_size=3)
    assert values(found) == pytest.approx(values(measure(student, Telling(teacher, few(6)), rows, tokenizer)))


def test_across_tokenizers_bits_per_byte_are_compared_and_nothing_else():
    student, teacher = tiny(1, 448), tiny(2, 528)
    ours, theirs = reader("unigram-tiny"), reader("tiny")
    rows = paired_rows()
    found = [
        measure(
            student, teacher, rows, ours, their_tokenizer=theirs, collate=pair_collator(layout=layout), batch_size=n
        )
        for layout, n in (("padded", 8), ("padding_free", 3))
    ]
    assert values(found[0]) == pytest.approx(values(found[1]), rel=1e-9)
    nats, spelt = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["their_ids"])[None]
        with torch.no_grad():
            log_p = teacher(ids).logits[0, :-1].log_softmax(-1)
        kept = torch.as_tensor(row["their_labels"])[1:]
        nats -= log_p[kept >= 0].gather(1, kept[kept >= 0, None]).sum().item()
        spelt += spelling_of(theirs).count(kept[kept >= 0].tolist())
    assert values(found[0])["teacher_bits_per_byte"] == pytest.approx(nats / math.log(2) / spelt)
    assert {"bits_per_byte", "cross_entropy"} <= set(found[0]["metrics"])
    assert not {"kl_to_teacher", "top1_agreement", "gap_closed"} & set(found[0]["metrics"])
    assert "its own tokenizer" in found[0]["notes"][0]


def test_models_that_see_images_are_measured_on_their_answers():
    student, teacher = tiny_vlm(1).double(), tiny_vlm(2, width=24).double()
    collate, rows = ImageTextCollator(processor(4), 200), rendered(6)
    found = [
        measure(student, teacher, rows, processor(4).tokenizer, collate=collate, batch_size=size) for size in (6, 4, 1)
    ]
    assert found[0]["documents"] == 6 and found[0]["metrics"]["kl_to_teacher"]["value"] > 0
    for other in found[1:]:
        assert values(other) == pytest.approx(values(found[0]), rel=1e-6)
