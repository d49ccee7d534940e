"""Pruned weights stay zero while any method trains, and the rest trains as if they were not there."""

from pathlib import Path

import pytest
import torch
from forks import on_ranks
from safetensors.torch import load_file
from tiny_models import rows, tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig, TrainerCallback

from kdlm import DistillTrainer
from kdlm.losses import CrossEntropy, ForwardKL
from kdlm.methods import LogitKD, SquareHead
from kdlm.models import Predictor
from kdlm.sparsity import SparsitySection
from kdlm.sparsity.calibration import input_norms
from kdlm.sparsity.layers import described_sparsity, prunable
from kdlm.sparsity.masks import follows

HALF = {"share": 0.5}
RISING = {"share": 0.7, "schedule": {"name": "cubic", "end": 0.8, "every": 1}}


def made(arguments, section: dict, method=None, teacher=None, **options) -> DistillTrainer:
    torch.manual_seed(5)
    run = DistillTrainer(
        tiny_model(1), teacher if teacher is not None else tiny_model(1),
        arguments(**{"max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1} | options),
        method=method or SquareHead([ForwardKL(), CrossEntropy()]),
        train_dataset=rows([5, 11, 3, 17, 8, 2, 13, 9]), eval_dataset=rows([6, 4], seed=3),
    )  # fmt: skip
    run.sparsify(SparsitySection(**section))
    return run


def weights(run: DistillTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.student.named_parameters()}


class Look(TrainerCallback):
    """Asks at the end of each step, before anything else can mend it, that what is pruned is zero."""

    def __init__(self, run: DistillTrainer):
        self.run, self.shares = run, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        run = self.run
        for name, mask in run.sparsity.masks.items():
            weight = run.sparsity.layers[name].weight
            assert (weight[mask] == 0).all() and (weight.grad[mask] == 0).all()
            for value in run.optimizer.state[weight].values():
                assert value.shape != mask.shape or (value[mask] == 0).all()
        self.shares.append(run.sparsity.share)


@pytest.mark.parametrize(
    "section", [HALF, RISING, {"pattern": "2:4"}, {**HALF, "criterion": "wanda", "scope": "row"}], ids=str
)
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_pruned_weights_gradients_and_moments_are_zero_after_every_step(arguments, section: dict, optim: str) -> None:
    run = made(arguments, section, optim=optim)
    look = Look(run)
    run.callback_handler.callbacks.insert(0, look)  # before the masks are applied again: weights do not drift at all
    run.train()
    assert look.shares == [SparsitySection(**section).share_at(step, 6) for step in range(6)]
    report = described_sparsity(run.student, run.sparsity.section)
    for name, layer in run.sparsity.layers.items():
        assert (
            report["layers"][name] == round(run.sparsity.section.target * layer.weight.numel()) / layer.weight.numel()
        )
        assert section.get("pattern") is None or follows(layer.weight, 2, 4)
    assert run.student.lm_head.weight.count_nonzero() == run.student.lm_head.weight.numel()


def test_an_optimiser_that_moves_pruned_weights_is_brought_back_by_the_mask(arguments) -> None:
    run = made(arguments, HALF)
    step = run.create_optimizer().step

    def restless(*args, **kwargs):
        result = step(*args, **kwargs)
        with torch.no_grad():
            for layer in run.sparsity.layers.values():
                layer.weight.add_(0.1)
        return result

    run.optimizer.step = restless
    run.train()
    assert all((run.sparsity.layers[name].weight[mask] == 0).all() for name, mask in run.sparsity.masks.items())


def test_a_dense_student_that_is_its_teacher_has_no_squarehead_and_a_pruned_one_has(arguments) -> None:
    method = SquareHead()
    run = made(arguments, HALF, method)
    assert run.evaluate()["eval_squarehead"] == 0.0
    run.sparsity.prune(0.5)
    half = run.evaluate()["eval_squarehead"]
    run.sparsity.prune(0.8)
    assert 0 < half < run.evaluate()["eval_squarehead"]


def test_pruning_without_training_is_the_masks_of_step_zero(arguments) -> None:
    run = made(arguments, HALF, max_steps=1, learning_rate=0.0)
    start = weights(run)
    run.train()
    for name, layer in run.sparsity.layers.items():
        before = start[f"{name}.weight"]
        smallest = before.abs().flatten().argsort(stable=True)[: before.numel() // 2]
        expected = before.flatten().index_fill(0, smallest, 0.0).view_as(before)
        assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize(
    "section",
    [RISING, {"pattern": "2:4"}, {**RISING, "scope": "global"}, {**RISING, "criterion": "wanda"}],
    ids=str,
)
def test_a_run_resumed_in_the_middle_of_the_schedule_ends_as_an_unbroken_one(
    arguments, tmp_path: Path, section
) -> None:
    whole = made(arguments, section, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "run"))
    whole.train()
    assert "mask.model.layers.0.mlp.up_proj" in load_file(
        tmp_path / "run" / "checkpoint-2/kdlm/sparsity_state.safetensors"
    )
    again = made(arguments, section, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "run"))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    ours, theirs = weights(whole), weights(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(whole.sparsity.masks[name], mask) for name, mask in again.sparsity.masks.items())


def test_a_checkpoint_of_a_dense_run_is_refused(arguments, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "run"), "max_steps": 2}
    run = DistillTrainer(tiny_model(1), tiny_model(2), arguments(**options), train_dataset=rows([5, 9, 4]))
    run.train()
    with pytest.raises(ValueError, match="sparsity: the checkpoint is of a run without it"):
        made(arguments, HALF, **options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_micro_batches_do_not_change_a_sparse_step(arguments) -> None:
    def trained(**options):
        run = made(arguments, HALF, max_steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0.5, **options)
        run.train()
        return weights(run)

    whole, split = trained(), trained(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, weight in whole.items():
        torch.testing.assert_close(split[name], weight, rtol=1e-4, atol=1e-6)


def test_the_norm_that_is_clipped_is_of_the_weights_that_train(arguments) -> None:
    run = made(arguments, HALF, max_steps=1, optim="sgd", max_grad_norm=1e-3, learning_rate=1.0, weight_decay=0.0)
    start, section = weights(run), run.sparsity.section
    run.train()
    pruned = dict(start)
    for name, mask in run.sparsity.masks.items():
        pruned[f"{name}.weight"] = start[f"{name}.weight"].masked_fill(mask, 0.0)
    moved = torch.stack([(weight - pruned[name]).norm() for name, weight in weights(run).items()]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2) and section.target == 0.5


def test_input_norms_are_of_real_tokens_alone() -> None:
    model = tiny_model(3)
    layers = prunable(model, SparsitySection(share=0.5, modules=["down_proj"]))
    ids = torch.randint(1, 61, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    padded = [{"input_ids": ids, "attention_mask": mask, "labels": ids}]
    alone = [{"input_ids": ids[:1], "labels": ids[:1]}, {"input_ids": ids[1:, :4], "labels": ids[1:, :4]}]
    ours, theirs = (input_norms(Predictor(model), layers, batches) for batches in (padded, alone))
    assert set(ours) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    for name, norms in ours.items():
        torch.testing.assert_close(norms, theirs[name])


@pytest.mark.parametrize(
    ("section", "said"),
    [({**HALF, "modules": ["k_prj"]}, "no linear layer's name ends in 'k_prj'"),
     ({"pattern": "2:5"}, "have 16 weights, which 5 do not divide")],
)  # fmt: skip
def test_what_cannot_be_pruned_is_refused_before_training(arguments, section: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(arguments, section)


def test_frozen_adapted_and_averaged_students_are_refused(arguments) -> None:
    frozen = tiny_model(1)
    frozen.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj is quantised or frozen"):
        prunable(frozen, SparsitySection(**HALF))
    adapted = nn.Sequential(nn.Linear(4, 4))
    adapted.peft_config = {}
    with pytest.raises(ValueError, match="fills its zeros"):
        prunable(adapted, SparsitySection(**HALF))
    method = LogitKD([ForwardKL()])
    method.ema = 0.9
    with pytest.raises(ValueError, match="hands out an average"):
        made(arguments, HALF, method)
    with pytest.raises(ValueError, match=r"sparsity\.schedule: the best checkpoint"):
        made(arguments, RISING, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_strategy="steps",
             save_steps=2)  # fmt: skip


def test_the_head_of_a_classifier_is_left_out_as_that_of_a_language_model_is() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for config in (BertConfig(vocab_size=61, **sizes), LlamaConfig(vocab_size=61, pad_token_id=0, **sizes)):
        names = prunable(AutoModelForSequenceClassification.from_config(config), SparsitySection(**HALF))
        assert names and not {"classifier", "score"} & names.keys()


def test_a_student_whose_turn_it_was_not_is_described_all_the_same() -> None:
    model = tiny_model(1).requires_grad_(False)
    assert described_sparsity(model, SparsitySection(**HALF))["share"] == 0.0


def test_a_run_too_short_for_its_levels_is_refused(arguments) -> None:
    levels = {"share": 0.7, "schedule": {"name": "levels", "before": [0.3, 0.5]}}
    with pytest.raises(ValueError, match=r"sparsity\.schedule: in 2 steps it comes to 0\.5 and not to 0\.7"):
        made(arguments, levels, max_steps=2).train()


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_two_ranks_have_one_mask_and_end_as_one_process(tmp_path: Path, criterion: str) -> None:
    for count in (1, 2):
        on_ranks(count, Path(__file__).with_name("two_ranks_sparsity.py"), tmp_path, criterion)
    one, two = (load_file(tmp_path / f"end-{count}") for count in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-6, atol=1e-8)
        assert torch.equal(two[name] == 0, weight == 0)
