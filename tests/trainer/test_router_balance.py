"""A student that is a mixture of experts keeps its routers in balance, beside any method's losses."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM, TrainingArguments
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.losses import CrossEntropy
from kdlm.methods import LogitKD
from kdlm.methods.method import Terms
from kdlm.models import Predictor
from kdlm.router_balance import RouterBalance, balance
from kdlm.signal import IGNORE_INDEX

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def mixture():
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=0.5)
    return model


def rows() -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate((9, 5, 7)):
        ids = torch.randint(3, 37, (length,), generator=draw)
        labels = ids.clone()
        labels[: number + 2] = IGNORE_INDEX
        made.append({"input_ids": ids.numpy(), "labels": labels.numpy()})
    return made


def gradient(collated: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the balance loss over batches, and its gradient on the first router."""
    model = mixture()
    student, beside = Predictor(model), RouterBalance(model, weight=1.0)
    total = torch.zeros(())
    for batch in collated:

        def advance(batch=batch):
            student.module.base_model(
                **{name: value for name, value in batch.items() if name not in ("labels", "weight")}, use_cache=False
            )
            return Terms({})

        total = total + beside.beside(advance, batch)().terms["router_balance"].sum
    total.backward()
    return total.detach(), model.model.layers[0].mlp.gate.weight.grad


def test_of_one_sequence_it_is_the_loss_of_transformers():
    logits = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    value, load = balance(logits, torch.zeros(11, dtype=torch.long), 1, chosen=2)
    torch.testing.assert_close(value[0], load_balancing_loss_func((logits,), 4, 2))
    assert 1 <= load[0] <= 2


def test_it_is_least_where_all_experts_are_asked_alike_and_most_where_two_are():
    alike = 20 * torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    value, load = balance(torch.cat([alike, 20 * torch.tensor([[1.0, 1, 0, 0]] * 2)]), torch.tensor([0, 0, 1, 1]), 2, 2)
    torch.testing.assert_close(value, torch.tensor([2.0, 4.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load, torch.tensor([1.0, 2.0]))


def test_the_gradient_is_the_same_however_rows_are_batched_padded_or_laid_end_to_end():
    padded, free = Collator(0), Collator(0, layout="padding_free")
    apart = gradient([padded([row]) for row in rows()])
    for batches in ([padded(rows())], [padded(rows()[:2]), padded(rows()[2:])], [free(rows())]):
        for ours, theirs in zip(gradient(batches), apart, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert apart[1].abs().max() > 0


def test_a_row_of_weight_two_counts_as_two_rows():
    padded = Collator(0)
    weighed = [row | {"weight": float(2 if number == 1 else 1)} for number, row in enumerate(rows())]
    twice = [*rows(), rows()[1]]
    for ours, theirs in zip(gradient([padded(weighed)]), gradient([padded(twice)]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def trained(tmp_path, *, weight: float | None, checkpointing: bool = False) -> tuple[DistillTrainer, dict]:
    args = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=3, learning_rate=3e-2, logging_steps=6, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    model = mixture()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    method = LogitKD([CrossEntropy()])
    trainer = DistillTrainer(model, None, args, method=method, train_dataset=rows(), data_collator=Collator(0))
    if weight is not None:
        trainer.balance_routers(weight)
    trainer.train()
    return trainer, next(logs for logs in trainer.state.log_history if "loss" in logs)


def test_a_heavy_weight_balances_the_load_and_a_tiny_one_changes_nothing(tmp_path):
    _, heavy = trained(tmp_path, weight=10.0)
    light, logs = trained(tmp_path, weight=1e-12)
    plain, without = trained(tmp_path, weight=None)
    assert heavy["router_balance"] < logs["router_balance"] and logs["expert_load"] >= 1
    assert "expert_load" not in without
    for name, weight in plain.student.state_dict().items():
        torch.testing.assert_close(light.student.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_layers_computed_again_on_the_way_back_are_not_counted_twice(tmp_path):
    once, logs = trained(tmp_path, weight=1.0)
    again, same = trained(tmp_path, weight=1.0, checkpointing=True)
    assert logs["router_balance"] == pytest.approx(same["router_balance"], rel=1e-5)
    for name, weight in once.student.state_dict().items():
        torch.testing.assert_close(again.student.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_a_student_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"student\.router_balance: the student is no mixture"):
        RouterBalance(LlamaForCausalLM(LlamaConfig(**SIZES)), 0.01)
