"""What a few rows of text say of a model that is to be pruned: which layers it misses least, what its experts need."""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear

from kdlm.models.inside import Ask
from kdlm.models.modes import evaluating
from kdlm.models.prediction import Predictor
from kdlm.signal import IGNORE_INDEX, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def batches(rows: Any, count: int) -> list[dict[str, Tensor]]:
    """Return the first `count` rows, each a batch without padding. Raises ValueError where there are none."""
    first = list(islice(iter(rows), count))
    if not first:
        raise ValueError("data.train: no rows to measure the student's layers or experts on")
    if "input_ids" not in first[0]:
        raise ValueError("student: what is pruned by measurement reads rows of text, and these are none")
    return [_alone(row) for row in first]


def _alone(row: dict[str, Any]) -> dict[str, Tensor]:
    ids, labels = (torch.as_tensor(row[name]).long() for name in ("input_ids", "labels"))
    lengths = torch.as_tensor(row.get("seq_lengths", len(ids))).flatten().tolist()
    positions = torch.cat([torch.arange(length) for length in lengths])
    labels = labels.masked_fill(positions == 0, IGNORE_INDEX)
    return {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None]}


@torch.no_grad()
def angular_distances(
    model: "PreTrainedModel", drop: int, rows: Sequence[dict[str, Tensor]], tokens: Literal["last", "all"]
) -> Float[Tensor, "blocks"]:
    """Return how far each block of `drop` consecutive layers turns the residual stream, by the block's first layer.

    The angle between what the block reads and what it writes, arccos(cosine) / pi in [0, 1], is averaged over the last
    tokens of all sequences, or over all tokens (arXiv 2403.17887, eq. 4).
    """
    reader = Predictor(model, reads_hidden=True)
    total, seen = torch.zeros(reader.num_layers - drop + 1, dtype=torch.float64), 0
    with evaluating(model):
        for batch in rows:
            read = {name: value.to(model.device) for name, value in batch.items()}
            starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
            ends = [end - 1 for end in (*starts[1:], batch["input_ids"].shape[1])]
            index = torch.tensor(ends) if tokens == "last" else torch.arange(batch["input_ids"].shape[1])
            kept = Rows(index.to(model.device), read["input_ids"][0, index.to(model.device)])
            _, inside = reader.inside(read, kept, Ask(layers=range(reader.num_layers), embeddings=True))
            states = [state.double() for state in (inside.embeddings, *inside.hidden)]  # pyright: ignore
            for first in range(len(total)):
                cosine = cosine_similarity(states[first], states[first + drop], dim=-1).clamp(-1, 1)
                total[first] += (cosine.arccos() / torch.pi).sum().cpu()
            seen += len(index)
    return total / seen


def expert_layers(model: nn.Module) -> dict[str, Any]:
    """Return the modules that hold the experts of a layer, as 3-D weights `gate_up_proj` and `down_proj`, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")
    }


def neuron_importance(
    model: "PreTrainedModel", rows: Sequence[dict[str, Tensor]]
) -> dict[str, Float[Tensor, "experts neurons"]]:
    """Return what each neuron of each expert adds to the loss, to first order: sum |gradient x activation|.

    The loss is the model's own, the cross-entropy of the rows' labels, summed; the sum runs over the tokens that were
    routed to the expert, so it is 0 for all neurons of one that no token reached. (SlimMoE, arXiv 2506.18349, has such
    a sensitivity; of which loss its code takes it is not known here.)
    """
    layers = expert_layers(model)
    scores = {
        name: torch.zeros(module.down_proj.shape[0], module.down_proj.shape[2], device=module.down_proj.device)
        for name, module in layers.items()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for name, module in layers.items():
        module.forward = _scoring(module, scores[name])
    try:
        with evaluating(model), torch.enable_grad():
            for batch in rows:
                read = {name: value.to(model.device) for name, value in batch.items()}
                embedded = model.get_input_embeddings()(read.pop("input_ids")).requires_grad_()
                model(inputs_embeds=embedded, use_cache=False, num_items_in_batch=1, **read).loss.backward()
    finally:
        for module in layers.values():
            del module.forward
        for parameter in trained:
            parameter.requires_grad_(True)
    return scores


def _scoring(experts: Any, scores: Float[Tensor, "experts neurons"]) -> Any:
    """Return a forward of these experts whose way back adds |gradient x activation| of neurons to `scores`."""

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = linear(hidden[token], experts.gate_up_proj[expert]).chunk(2, -1)
            neurons = experts.act_fn(gate) * up

            neurons.register_hook(partial(_add, scores[expert], neurons.detach()))
            written = linear(neurons, experts.down_proj[expert]) * weights[token, place, None]
            out = out.index_add(0, token, written.to(out.dtype))
        return out

    return forward


def _add(score: Float[Tensor, "neurons"], neurons: Tensor, gradient: Tensor) -> None:
    score += (gradient * neurons).float().abs().sum(0)
