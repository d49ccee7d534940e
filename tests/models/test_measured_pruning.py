"""What a pruned student leaves out by measurement: the block of layers that changes least, neurons of experts."""

import copy
import math

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kdlm.models import Pruned
from kdlm.models.calibration import angular_distances, batches, expert_layers, neuron_importance
from kdlm.models.pruned import Width
from kdlm.models.pruning import expert_size, prune, without_block

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURES = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)),
    "phimoe": lambda: PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=4)),
}
IDS = torch.arange(1, 11)[None]


def rows(count: int = 3, length: int = 12) -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 37, (length,), generator=draw) for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in ids]


def dense(layers: int = 6) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers}, initializer_range=0.2)).eval()


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    model = MIXTURES[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def to_size(model, size: int) -> Width:
    key = "moe_intermediate_size" if hasattr(model.config, "moe_intermediate_size") else "intermediate_size"
    return Width.model_validate({key: size})


def section(folder, **options) -> Pruned:
    return Pruned.model_validate({"name": "pruned", "source": {"name": "pretrained", "path": str(folder)}, **options})


def test_the_distance_of_a_block_is_the_angle_between_what_it_reads_and_writes():
    model, given = dense(), rows(2)
    found = {tokens: angular_distances(model, 2, batches(given, 2), tokens) for tokens in ("last", "all")}
    angles = {"last": torch.zeros(5), "all": torch.zeros(5)}
    for row in given:
        with torch.no_grad():  # outputs of the last layer here are before the norm: take all but it
            states = model.model(row["input_ids"][None], output_hidden_states=True).hidden_states[:-1]
        for first in range(4):
            a, b = states[first][0], states[first + 2][0]
            angle = (a * b).sum(-1).div(a.norm(dim=-1) * b.norm(dim=-1)).arccos() / math.pi
            angles["last"][first] += angle[-1] / 2
            angles["all"][first] += angle.mean() / 2
    for tokens, one in found.items():
        torch.testing.assert_close(one[:4].float(), angles[tokens][:4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_a_block_that_does_nothing_is_found_and_its_loss_is_not_noticed(tokens, tmp_path, capsys):
    model = dense()
    with torch.no_grad():
        for layer in model.model.layers[2:4]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    student = section(tmp_path, layers={"drop": 2, "tokens": tokens}).load_from(rows(), seed=0).eval()
    assert "layers 2 to 3 of 6 left out" in capsys.readouterr().out
    assert student.config.num_hidden_layers == 4
    torch.testing.assert_close(student(IDS).logits, model(IDS).logits)


def test_the_student_is_the_source_with_the_block_of_the_least_distance_skipped(tmp_path):
    model = dense()
    model.save_pretrained(tmp_path)
    distances = angular_distances(model, 2, batches(rows(), 3), "last")
    first = int(distances.argmin())
    assert without_block(distances, 2) == [i for i in range(6) if i not in (first, first + 1)]
    student = section(tmp_path, layers={"drop": 2}).load_from(rows(), seed=0).eval()
    del model.model.layers[first : first + 2]
    torch.testing.assert_close(student(IDS).logits, model(IDS, use_cache=False).logits)


def test_dropping_no_layer_changes_nothing(tmp_path):
    model = dense()
    model.save_pretrained(tmp_path)
    student = section(tmp_path, layers={"drop": 0}).load_from(rows(), seed=0).eval()
    assert torch.equal(student(IDS).logits, model(IDS).logits)


def test_packed_sequences_are_measured_as_if_they_stood_alone():
    model, alone = dense(), rows(2)
    packed = {name: torch.cat([row[name] for row in alone]) for name in alone[0]} | {"seq_lengths": [12, 12]}
    apart = angular_distances(model, 2, batches(alone, 2), "last")
    torch.testing.assert_close(angular_distances(model, 2, batches([packed], 1), "last"), apart)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": {"drop": 6}}, "student.layers.drop: 6 is not below the source's 6"),
        ({"layers": {"drop": 1}, "given": []}, "data.train: no rows"),
        ({"layers": {"drop": 1}, "given": [{"pixel_values": 0}]}, "reads rows of text"),
        ({"width": {"moe_intermediate_size": 8}}, "student.width.moe_intermediate_size: llama has no such size"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(options, named, tmp_path):
    dense().save_pretrained(tmp_path)
    given = options.pop("given", rows())
    with pytest.raises(ValueError, match=named):
        section(tmp_path, **options).load_from(given, seed=0)
    if "drop" in str(options):
        with pytest.raises(ValueError, match=r"student\.layers"):
            section(tmp_path, **options).load()


def test_experts_that_keep_all_neurons_are_the_source(mixture):
    scores = neuron_importance(mixture, batches(rows(), 3))
    same = prune(mixture, None, to_size(mixture, expert_size(mixture.config)), scores).eval()
    assert torch.equal(same(IDS).logits, mixture(IDS).logits)


def test_slim_experts_compute_what_the_source_does_with_the_other_neurons_masked(mixture):
    scores, size = neuron_importance(mixture, batches(rows(), 3)), expert_size(mixture.config) // 2
    slim, masked = prune(mixture, None, to_size(mixture, size), scores).eval(), copy.deepcopy(mixture)
    with torch.no_grad():
        for name, module in expert_layers(masked).items():
            kept = torch.zeros_like(scores[name]).scatter(1, scores[name].topk(size, dim=1).indices, 1)
            module.down_proj.mul_(kept[:, None])
    torch.testing.assert_close(slim(IDS).logits, masked(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(slim(IDS).logits, mixture(IDS).logits, atol=1e-3)
    cut = sum(module.down_proj.numel() for module in expert_layers(mixture).values()) // 2 * 3
    assert mixture.num_parameters() - slim.num_parameters() == cut


def test_the_importance_of_a_neuron_is_the_sum_over_its_tokens_of_gradient_times_activation(mixture):
    """Against a product with gates of ones, whose gradient at each token is gradient times activation."""
    given = batches(rows(1), 1)
    found = neuron_importance(mixture, given)
    name, module = next(iter(expert_layers(mixture).items()))
    read: list[tuple] = []
    handle = module.register_forward_pre_hook(lambda module, args: read.append(args))
    mixture(given[0]["input_ids"])
    handle.remove()
    hidden, chosen, weights = read[0]
    expert = int(chosen.flatten().mode().values)
    token, place = (chosen == expert).nonzero(as_tuple=True)
    gates = torch.ones(len(token), expert_size(mixture.config), requires_grad=True)

    def gated(module, args, output):
        gate, up = torch.nn.functional.linear(hidden[token], module.gate_up_proj[expert]).chunk(2, -1)
        neurons = module.act_fn(gate) * up * (gates - 1)
        return output.index_add(0, token, neurons @ module.down_proj[expert].T * weights[token, place, None])

    handle = module.register_forward_hook(gated)
    mixture(given[0]["input_ids"], labels=given[0]["labels"], num_items_in_batch=1).loss.backward()
    handle.remove()
    torch.testing.assert_close(found[name][expert], gates.grad.abs().sum(0), rtol=1e-3, atol=1e-6)
    assert all(parameter.requires_grad for parameter in mixture.parameters())


def test_dead_neurons_go_though_their_weights_are_the_largest(mixture):
    """Their gates are shut, so that they never fire."""
    size, dead = expert_size(mixture.config), slice(3, 11)
    with torch.no_grad():
        for module in expert_layers(mixture).values():
            module.gate_up_proj[:, dead] = 0  # silu(0) = 0
            module.gate_up_proj[:, size + 3 : size + 11] *= 100
            module.down_proj[:, :, dead] *= 100
    scores = neuron_importance(mixture, batches(rows(), 3))
    slim = prune(mixture, None, to_size(mixture, size - 8), scores).eval()
    torch.testing.assert_close(slim(IDS).logits, mixture(IDS).logits, rtol=1e-4, atol=1e-5)
    by_weights = prune(mixture, None, to_size(mixture, size - 8)).eval()
    assert not torch.allclose(by_weights(IDS).logits, mixture(IDS).logits, atol=1e-3)


def test_an_expert_that_no_token_reaches_is_cut_by_its_weights(mixture):
    scores = neuron_importance(mixture, batches(rows(), 3))
    name = next(iter(scores))
    scores[name][1] = 0
    size = expert_size(mixture.config) // 2
    measured, weighed = (
        expert_layers(prune(mixture, None, to_size(mixture, size), given))[name] for given in (scores, {})
    )
    assert torch.equal(measured.down_proj[1], weighed.down_proj[1])
    assert not torch.equal(measured.down_proj, weighed.down_proj)


def test_experts_that_no_token_reaches_have_no_score(mixture):
    """Of two tokens the last predicts nothing, so that in the first layer only the two experts of the first count."""
    given = rows(1, 2)
    routed: list[torch.Tensor] = []
    name, module = next(iter(expert_layers(mixture).items()))
    handle = module.register_forward_pre_hook(lambda module, args: routed.append(args[1]))
    mixture(given[0]["input_ids"][None])
    handle.remove()
    score = neuron_importance(mixture, batches(given, 1))[name]
    assert {expert for expert in range(4) if score[expert].any()} == set(routed[0][0].tolist())


def test_two_stages_end_in_the_shape_of_one(mixture):
    whole = expert_size(mixture.config)
    half = prune(mixture, None, to_size(mixture, whole // 2))
    staged = prune(half, None, to_size(mixture, whole // 4))
    direct = prune(mixture, None, to_size(mixture, whole // 4))
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (staged, direct)]
    assert shapes[0] == shapes[1] and staged.config.to_dict() == direct.config.to_dict()


def test_layers_of_a_mixture_go_with_their_kind(tmp_path):
    """Where some layers are dense, those that are left keep what they are."""
    torch.manual_seed(0)
    options = {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**{**SIZES, "num_hidden_layers": 6}, **options, decoder_sparse_step=2, mlp_only_layers=[1])
    model = Qwen3MoeForCausalLM(config).eval()
    student = prune(model, [0, 1, 3, 5], Width()).eval()
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in (0, 1, 3, 5))
    torch.testing.assert_close(student(IDS).logits, model(IDS, use_cache=False).logits)
    student.save_pretrained(tmp_path)
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, student(IDS).logits)


def test_a_recipes_student_of_slim_experts_is_measured_on_the_rows(mixture, tmp_path):
    mixture.save_pretrained(tmp_path)
    size = expert_size(mixture.config) // 2
    width = to_size(mixture, size)
    made = section(tmp_path, width=width.model_dump(exclude_none=True), rows=2)
    by_hand = prune(mixture, None, width, neuron_importance(mixture, batches(rows(), 2)))
    student = made.load_from(rows(), seed=0)
    assert expert_size(made.config()) == size
    torch.testing.assert_close(student.eval()(IDS).logits, by_hand.eval()(IDS).logits)


def test_a_size_that_fused_kernels_cannot_read_is_refused(mixture):
    with pytest.raises(ValueError, match=r"student\.width\.(moe_)?intermediate_size: 12 .* multiples of 8"):
        prune(mixture, None, to_size(mixture, 12))


def test_norms_over_all_heads_keep_their_heads():
    with pytest.raises(ValueError, match=r"student\.width: OLMoE"):
        prune(MIXTURES["olmoe"](), None, Width(num_attention_heads=2))
