"""PS-KD of text: cross-entropy at first, then softened by the student as it was an epoch ago."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.losses import CrossEntropy, kept_rows, progressive_cross_entropy
from kdlm.methods import LogitKD, Step, TokenPSKD
from kdlm.networks import Networks

VOCAB = 23


def student() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in (5, 7, 4, 6)]
    return [{"input_ids": each, "labels": each} for each in ids]


def trainer(folder: Path, method=None, **options) -> DistillTrainer:
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, per_device_train_batch_size=2, disable_tqdm=True,
        **{"max_steps": 6, "learning_rate": 0.01, "save_strategy": "no", "seed": 3} | options,
    )  # fmt: skip
    own = method or TokenPSKD()
    return DistillTrainer(student(), args=args, method=own, train_dataset=rows(), eval_dataset=rows())


def test_the_first_epoch_is_cross_entropy_and_later_ones_are_the_formula():
    method = TokenPSKD(end=0.8)
    nets = Networks(student(), method, None).views
    with torch.no_grad():
        for parameter in nets["previous"].module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = Collator(0)(rows())
    kept = kept_rows(batch["labels"])
    first = method.losses(nets, batch, frozenset({"student"}), Step(0, 8, 0, 0, 4))
    plain = LogitKD([CrossEntropy()]).losses(nets, batch, frozenset({"student"}), Step(0, 8))
    torch.testing.assert_close(first.terms["token_loss"].sum, plain.terms["token_loss"].sum)
    later = method.losses(nets, batch, frozenset({"student"}), Step(6, 8, 3, 0, 4))
    logits = [
        nets[role].module(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1] for role in nets
    ]
    at = batch["labels"][:, 1:] != -100
    expected = progressive_cross_entropy(logits[0][at], logits[1][at], kept.labels, share=0.8)
    torch.testing.assert_close(later.terms["token_loss"].sum, expected.sum(), rtol=1e-4, atol=1e-4)


def test_the_share_grows_in_even_steps_from_none_in_the_first_epoch_to_the_whole_in_the_last():
    shares = [TokenPSKD(end=0.8).share(Step(2 * epoch, 8, epoch, 0, 4)) for epoch in range(4)]
    assert shares == pytest.approx([0.0, 0.4, 0.6, 0.8])
    assert TokenPSKD(end=0.8).share(Step(8, 8, 4, 0, 4)) == pytest.approx(0.8)  # evaluated when all is done


def test_an_end_of_nothing_is_cross_entropy_to_the_last_bit(tmp_path: Path):
    ours, plain = trainer(tmp_path / "ours", TokenPSKD(end=0.0)), trainer(tmp_path / "plain", LogitKD([CrossEntropy()]))
    for each in (ours, plain):
        each.train()
    for one, other in zip(ours.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cut", [2, 3])
def test_a_run_resumes_exactly_within_an_epoch_and_at_its_end(tmp_path: Path, cut: int):
    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "cut", save_strategy="steps", save_steps=cut).train()
    second = trainer(tmp_path / "cut")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{cut}"))
    for role in ("student", "previous"):
        expected = whole.networks.module_of(role).state_dict()
        for name, tensor in second.networks.module_of(role).state_dict().items():
            assert torch.equal(tensor, expected[name]), (role, name)


def test_evaluation_gives_cross_entropy_beside_the_steps_own_loss(tmp_path: Path):
    figures = trainer(tmp_path).evaluate()
    assert figures["eval_cross_entropy"] == pytest.approx(figures["eval_ps_kd"])  # no epoch is done
