"""acm: what each stage trains, what its labels are, and how it keeps to a budget."""

import pytest
import torch
from weighed_batches import KINDS, STEP, adaptive_networks, gradient, llama, reduced

from kdlm.losses import ForwardKL
from kdlm.methods import ACM
from kdlm.methods.structure.gates import gumbel, worthwhile
from kdlm.models import Predictor, adaptive_layers
from kdlm.teachers import LocalTeacher

GIVEN = KINDS["given"]


def batches(cut: list[list[int]], layout: str = "padded"):
    groups = GIVEN.groups()
    return [GIVEN.batch([(groups[i], None) for i in part], layout) for part in cut]


def started(budget: float = 0.5, mean: float = 0.8, **options) -> ACM:
    method = ACM([ForwardKL()], budget=budget, **options)
    method.stepped(STEP, {"share": torch.tensor(mean)})
    return method


def moved(method: ACM, nets) -> set[str]:
    loss, _ = reduced(method, nets, batches([[0, 1, 2]]))
    names = [name for name, _ in nets["student"].module.named_parameters()]
    grads = torch.autograd.grad(loss, nets["student"].module.parameters(), allow_unused=True)
    return {name for name, grad in zip(names, grads, strict=True) if grad is not None and grad.any()}


def test_each_stage_moves_its_part_alone() -> None:
    nets = adaptive_networks()
    learners, gates = (moved(ACM(stage=stage), nets) for stage in ("learners", "gates"))
    assert learners and all(".mlp." in name and ".choice." not in name for name in learners)
    assert gates and all(".choice." in name for name in gates)
    assert moved(started(), nets) >= gates


def test_learners_that_sum_to_the_teacher_have_no_error_at_their_full_number() -> None:
    nets = adaptive_networks() | {"teacher": LocalTeacher(llama(1))}
    _, means = reduced(ACM(stage="learners"), nets, batches([[0, 1, 2]]), "evaluate")
    errors = [float(means[f"error_{n}"]) for n in range(1, 5)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-3 and errors[-1] < 1e-9


def test_a_label_is_the_first_learner_that_hardly_helped() -> None:
    class Layer:
        learners = 4

        def sums(self, x):
            """Errors of 8, 4, 3.9, 1 where a token is 0, and of 8, 4, 2, 1 where it is 1."""
            return torch.tensor([[8.0, 4.0, 3.9, 1.0], [8.0, 4.0, 2.0, 1.0]])[x[:, 0].long()][..., None]

    x = torch.tensor([[0.0], [1.0]])
    assert worthwhile(Layer(), x, torch.zeros(2, 1), 0.9).tolist() == [3, 4]
    assert worthwhile(Layer(), x, torch.zeros(2, 1), 0.5).tolist() == [2, 2]


@pytest.mark.parametrize("stage", ["learners", "gates", "whole"])
def test_neither_the_cut_into_micro_batches_nor_the_layout_shows_in_the_gradient(stage: str) -> None:
    nets, method = adaptive_networks(), started(stage=stage)
    whole, _ = reduced(method, nets, batches([[0, 1, 2]]))
    wanted = gradient(whole, nets)
    assert wanted.abs().max() > 1e-4
    for parts in (batches([[0], [1], [2]]), batches([[2], [0, 1]]), batches([[0, 1, 2]], "padding_free")):
        loss, _ = reduced(method, nets, parts)
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(gradient(loss, nets), wanted, rtol=1e-5, atol=1e-7)


def test_the_cost_pulls_the_share_towards_the_budget_from_either_side() -> None:
    nets = adaptive_networks()
    down, up = (started(mean=mean, entropy_weight=0.0, diversity_weight=0.0, budget_weight=1.0) for mean in (0.8, 0.2))
    none = started(mean=0.5, entropy_weight=0.0, diversity_weight=0.0)
    grads = [gradient(reduced(one, nets, batches([[0, 1, 2]]))[0], nets) for one in (down, up, none)]
    torch.testing.assert_close(grads[0] - grads[2], grads[2] - grads[1], rtol=1e-3, atol=1e-6)
    assert (grads[0] - grads[2]).abs().max() > 1e-4


def test_a_budget_of_1_removes_the_cost_term() -> None:
    nets = adaptive_networks()
    with_cost, without = started(budget=1.0, mean=0.3), started(budget=1.0, mean=0.3, budget_weight=0.0)
    one, other = (gradient(reduced(method, nets, batches([[0, 1]]))[0], nets) for method in (with_cost, without))
    assert torch.equal(one, other)


def test_the_cost_term_is_the_distance_to_the_budget() -> None:
    nets, method = adaptive_networks(), started(budget=0.25)
    terms = method.losses(nets, batches([[0, 1, 2]])[0], frozenset(), STEP)
    share, positions = terms.metrics["share"][0], method.counts(batches([[0, 1, 2]])[0])["positions"]
    torch.testing.assert_close(terms.terms["cost"].sum.detach() / positions, share / positions - 0.25)


def test_noise_belongs_to_a_token_in_its_place_and_to_the_step() -> None:
    layers = adaptive_layers(adaptive_networks()["student"].module)
    (alone,), (together,), (flat,) = batches([[0]]), batches([[0, 2]]), batches([[0, 2]], "padding_free")
    one, two, three = (gumbel(layers, batch, STEP) for batch in (alone, together, flat))
    length = alone["input_ids"].shape[1]
    for path in layers:
        torch.testing.assert_close(one[path][0], two[path][0, :length])
        torch.testing.assert_close(one[path][0], three[path][0, :length])
    first, second = one.values()
    assert not torch.equal(first, second)


def test_its_state_is_the_share_of_the_step_before() -> None:
    method, again = started(mean=0.7), ACM([ForwardKL()])
    again.load_state_dict(method.state_dict())
    nets = adaptive_networks()
    losses = [reduced(one, nets, batches([[0, 1, 2]]))[0] for one in (method, again, ACM([ForwardKL()]))]
    assert losses[0] == losses[1] != losses[2]


def test_a_student_without_adaptive_layers_is_refused_by_name() -> None:
    nets = {"student": Predictor(llama(1)), "teacher": LocalTeacher(llama(2))}
    with pytest.raises(ValueError, match="name: adaptive"):
        ACM(stage="gates").losses(nets, batches([[0]])[0], frozenset(), STEP)


def test_layers_that_are_run_a_second_time_are_refused() -> None:
    nets = adaptive_networks()
    module = nets["student"].module
    module.activation_checkpointing_enable()
    module.train()
    try:
        with pytest.raises(ValueError, match="gradient_checkpointing"):
            started().losses(nets, batches([[0]])[0], frozenset(), STEP)
    finally:
        module.activation_checkpointing_disable()
        module.eval()


@pytest.mark.parametrize("stage", ["learners", "gates"])
def test_a_teacher_may_be_of_another_dtype(stage) -> None:
    """float32 learners of a checkpoint in bfloat16, without autocast."""
    nets = adaptive_networks()
    nets["student"].module.float()
    nets["teacher"] = LocalTeacher(llama(1).bfloat16())
    assert reduced(ACM(stage=stage), nets, batches([[0, 1, 2]]))[0].isfinite()
