"""CurioSFT: cross-entropy beside an anchor on a softened average of the student, which moves every few steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.losses import CrossEntropy, kept_rows, softened_anchor
from kdlm.methods import CurioSFT, CurioSFTSection, LogitKD, Step
from kdlm.networks import Networks

VOCAB = 31
ACTIVE, STEP = frozenset({"student"}), Step(0, 8)


def student() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes))


def text(seed: int, count: int, length: int = 12) -> list[dict]:
    """Rows of a fixed random law of the next token."""
    law = (1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(42))).softmax(-1)
    generator, made = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        ids = torch.randint(VOCAB, (1,), generator=generator).tolist()
        while len(ids) < length:
            ids.append(int(torch.multinomial(law[ids[-1]], 1, generator=generator)))
        made.append({"input_ids": ids, "labels": ids})
    return made


def trainer(folder: Path, method, **options) -> DistillTrainer:
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", seed=3,
        **{"max_steps": 5, "learning_rate": 0.01, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 64,
           "lr_scheduler_type": "constant"} | options,
    )  # fmt: skip
    return DistillTrainer(student(), args=args, method=method, train_dataset=text(1, 32), eval_dataset=text(2, 64))


def apart(method) -> dict:
    """Return the networks of a method, the reference pushed away from the student."""
    nets = Networks(student(), method, None).views
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in nets["reference"].module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return nets


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_loss_is_cross_entropy_and_the_anchor_to_the_reference(weight: float):
    method = CurioSFT(weight=weight, temperatures=(1.0, 2.0))
    nets, batch = apart(method), Collator(0)(text(3, 4))
    kept = kept_rows(batch["labels"])
    ours, theirs = (
        kept.select(nets[role].module(input_ids=batch["input_ids"]).logits) for role in ("student", "reference")
    )
    anchor = softened_anchor(ours, theirs, kept.labels, low=1.0, high=2.0)
    expected = torch.nn.functional.cross_entropy(ours, kept.labels, reduction="sum") + weight * anchor.sum()
    terms = method.losses(nets, batch, ACTIVE, STEP)
    torch.testing.assert_close(terms.terms["token_loss"].sum, expected)
    torch.testing.assert_close(terms.metrics["anchor"][0], anchor.sum().detach())


def test_without_weight_the_gradient_is_that_of_fine_tuning():
    batch, grads = Collator(0)(text(3, 4)), []
    for method in (CurioSFT(weight=0.0), LogitKD([CrossEntropy()])):
        nets = apart(method) if isinstance(method, CurioSFT) else Networks(student(), method, None).views
        method.losses(nets, batch, ACTIVE, STEP).terms["token_loss"].sum.backward()
        grads.append([parameter.grad for parameter in nets["student"].module.parameters()])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_the_reference_waits_and_then_takes_its_share_of_the_student(tmp_path: Path):
    start = [parameter.detach().clone() for parameter in student().parameters()]
    early = trainer(tmp_path, CurioSFT(), max_steps=4)
    early.train()
    for kept, first in zip(early.networks.averages["reference"].parameters(), start, strict=True):
        assert torch.equal(kept, first)
    due = trainer(tmp_path, CurioSFT(decay=0.9, every=5), max_steps=9)
    moved = trainer(tmp_path, CurioSFT(decay=0.9, every=5))
    for each in (due, moved):
        each.train()
    pairs = zip(moved.networks.averages["reference"].parameters(), start, moved.student.parameters(), strict=True)
    for kept, first, now in pairs:
        torch.testing.assert_close(kept, 0.9 * first + 0.1 * now.detach())
    both = (each.networks.averages["reference"].parameters() for each in (due, moved))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))  # steps 6 to 9 have no move


def test_the_student_stays_less_certain_of_new_text_at_equal_cross_entropy(tmp_path: Path):
    """Both memorise 32 rows; of rows that they have not seen, entropies are compared where cross-entropies agree."""
    curves = []
    for name, method, steps in (("plain", LogitKD([CrossEntropy()]), 40), ("curio", CurioSFT(), 60)):
        run = trainer(tmp_path / name, method, max_steps=steps, eval_strategy="steps", eval_steps=4)
        run.train()
        logs = [log for log in run.state.log_history if "eval_loss" in log]
        curves.append(np.array([(log["eval_cross_entropy"], log["eval_student_entropy"]) for log in logs]))
    plain, curious = curves
    rising = plain[plain[:, 0].argmin() :]
    level, entropy = curious[-1]
    assert rising[0, 0] < level < rising[-1, 0]
    assert entropy > np.interp(level, rising[:, 0], rising[:, 1]) + 0.01
    assert curious[-1, 1] > plain[-1, 1] + 0.3  # and it has gone less far, though it trained for longer


def test_a_recipe_with_losses_or_a_falling_range_of_temperatures_is_refused():
    with pytest.raises(ValueError, match="curio_sft has a loss of its own: leave them out"):
        CurioSFTSection().build([CrossEntropy()], None)
    with pytest.raises(ValueError, match="not above the highest"):
        CurioSFTSection(temperatures=(1.5, 1.1))
    assert isinstance(CurioSFTSection().build([], None), CurioSFT)
