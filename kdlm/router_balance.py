"""RouterBalance: keeps the routers of a mixture of experts from sending all tokens to a few of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kdlm.losses import kept_rows, real_rows
from kdlm.methods.method import Batch, Term, Terms
from kdlm.signal import sequence_of, weights_of

NAME = "router_balance"


class RouterBalance:
    """Adds a balance loss to the terms of any method that runs the student on the batch, and logs the experts' load.

    The student's forward does not change: hooks keep what its routers said. In each sequence and layer the loss is
    E sum_e f_e P_e, with f_e the number of choices of expert e for each token and P_e the mean of its probability, as
    in transformers' `load_balancing_loss_func` (Switch Transformer, arXiv 2101.03961, eq. 4 to 6), whose coefficient
    `router_aux_loss_coef` therefore fits: it is the number of experts a token at perfect balance. Unlike there it is
    taken sequence by sequence and layer by layer (as DeepSeek-V3's, arXiv 2412.19437, eq. 17) and then averaged, a
    sequence counting as often as it has trained tokens: so the gradient does not change with micro-batches, padding,
    packing or ranks.

    The metric `expert_load` is how many times its equal share the busiest expert takes, averaged likewise: 1 at best.

    Args:
        student: a mixture of experts of transformers.
        weight: of the loss.

    Raises ValueError for a student without routers.
    """

    def __init__(self, student: nn.Module, weight: float):
        self.weight, self.recording = weight, False
        self.said: dict[int, Tensor] = {}
        self.experts, self.chosen = of_routers(student)
        for number, router in enumerate(routers(student)):
            router.register_forward_hook(partial(self._keep, number))

    def beside(self, advance: Callable[[], Terms], batch: Batch) -> Callable[[], Terms]:
        """Return what computes the method's terms and, with the last of them, this one."""

        def further() -> Terms:
            with self._recorded():
                terms = advance()
                return terms if terms.more else self._added(terms, batch)

        return further

    def _added(self, terms: Terms, batch: Batch) -> Terms:
        rows, tokens = real_rows(batch), batch["input_ids"].numel()
        if not self.said or any(len(logits) != tokens for logits in self.said.values()):
            raise ValueError(
                "student.router_balance: this method does not run the student on the batch as it is, or its layers run "
                "without a graph (training.gradient_checkpointing_kwargs: set use_reentrant: false)"
            )
        place = sequence_of(batch)
        sequence, trained = rows.select(place), kept_rows(batch["labels"], weights_of(batch))
        weights = torch.zeros(int(place.max()) + 1, device=sequence.device)
        ones = torch.ones(len(trained), device=sequence.device) if trained.weights is None else trained.weights
        weights = weights.index_add(0, trained.select(place), ones.to(weights))
        found = [balance(logits[rows.index], sequence, len(weights), self.chosen) for logits in self.said.values()]
        loss, load = (weights @ torch.stack(values).mean(0) for values in zip(*found, strict=True))
        added = {NAME: Term(loss, "tokens", self.weight)}
        return replace(terms, terms=terms.terms | added, metrics=terms.metrics | {"expert_load": (load, "tokens")})

    def _keep(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        if self.recording and torch.is_grad_enabled():
            self.said[number] = output[0].flatten(0, -2)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        self.recording = True
        try:
            yield
        finally:  # a layer that is computed again on the way back is not heard
            self.recording = False
            self.said.clear()


def balance(
    logits: Float[Tensor, "rows experts"], sequence: Int[Tensor, "rows"], sequences: int, chosen: int
) -> tuple[Float[Tensor, "sequences"], Float[Tensor, "sequences"]]:
    """Return the balance loss of each sequence, and how many times its equal share the busiest expert takes."""
    probabilities, experts = logits.float().softmax(-1), logits.shape[-1]
    picked = torch.zeros_like(probabilities).scatter(1, probabilities.topk(chosen, dim=-1).indices, 1)
    length = torch.zeros(sequences, device=logits.device).index_add(0, sequence, torch.ones_like(picked[:, 0]))
    empty = torch.zeros(sequences, experts, device=logits.device)
    shares, means = (
        empty.index_add(0, sequence, values) / length.clamp(min=1)[:, None] for values in (picked, probabilities)
    )
    return experts * (shares * means).sum(-1), shares.max(-1).values * experts / chosen


def routers(student: nn.Module) -> list[nn.Module]:
    """Return the routers of a model, one a layer; those by which transformers knows them."""
    recorded = [getattr(module, "_can_record_outputs", None) or {} for module in student.modules()]
    kinds = {one["router_logits"].target_class for one in recorded if "router_logits" in one}
    return [module for module in student.modules() if type(module) in kinds]


def of_routers(student: Any) -> tuple[int, int]:
    """Return how many experts a layer of a student has and how many a token takes. Raises ValueError without any."""
    config = student.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    if not chosen or not routers(student):
        raise ValueError(
            "student.router_balance: the student is no mixture of experts whose routers are known: remove it"
        )
    return config.num_local_experts, chosen
