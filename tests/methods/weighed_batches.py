"""Groups of rows of every kind that a method of text takes, as batches, and small networks that read them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from readers import reader
from tiny_masked import MASK, tiny_masked
from tiny_vlm import rendered, tiny_vlm
from transformers import LlamaConfig, LlamaForCausalLM
from two_tokenizers import paired_rows

from kdlm.data import Collator, ContextCollator, ImageTextCollator, PairCollator
from kdlm.methods import Method, Step, Terms, Trainable
from kdlm.models import Predictor, adaptive_layers
from kdlm.models.adaptive_student import described, make_adaptive
from kdlm.rollouts import SAID, Completion, Written, as_row, describe
from kdlm.sandbox.vision_language import processor
from kdlm.signal import IGNORE_INDEX, domain_id
from kdlm.teachers import LocalTeacher
from kdlm.trainer import DistillTrainer

VOCAB = 41
STEP = Step(5, 10, epoch=1, epochs=3, seed=3)
Batch = dict[str, Any]
Group = list[Any]
"""The rows of one prompt: of the data, or `Written`, and alike in weight."""


def llama(seed: int, width: int = 16, vocab: int = VOCAB) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config: Any = {"vocab_size": vocab, "initializer_range": 0.4, "max_position_embeddings": 128, **sizes}
    return LlamaForCausalLM(LlamaConfig(**config)).double().eval()


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(1, VOCAB - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def given(number: int) -> dict[str, Any]:
    """A row of the data, with a prompt of two tokens."""
    read, task = ids(5 + 3 * number, number), domain_id("rationale" if number else "label")
    return {"input_ids": read, "labels": [IGNORE_INDEX] * 2 + read[2:], "index": number, "domain": task}


def own(number: int, sample: int, *, turns: int = 1) -> Written:
    """A completion of the prompt of a row, or an episode of two turns."""
    seed = 100 * number + sample
    said, of = ids(3 + (seed * 7) % 4, seed), None
    logs = (-torch.rand(len(said), generator=torch.Generator().manual_seed(seed)) * 4).tolist()
    reward = float((number + sample) % 2)
    if turns == 2:
        words, second = ids(2, seed + 1), ids(3, seed + 2)
        of = [0] * len(said) + [SAID] * 2 + [1] * 3
        said, logs = [*said, *words, *second], [*logs, 0.0, 0.0, -1.0, -2.0, -1.5]
    done = Completion(ids=said, log_probs=logs, stop="end", group=number, version=0)
    rewards = [0.25 * sample, reward] if turns == 2 else []
    told = [7 + number, 8, 9] if (number, sample) != (0, 1) else None
    return Written(
        given(number) | {"asked": "?"}, given(number)["input_ids"][:2], done, "", reward,
        turns=of, turn_rewards=rewards, context_prompt=told,
    )  # fmt: skip


def preference(number: int) -> dict[str, Any]:
    """Two answers to the prompt of a row, in one row."""
    one, other = given(number), given((number + 1) % 3)
    joined = {name: [*one[name], *other[name]] for name in ("input_ids", "labels")}
    return joined | {"seq_lengths": [len(side["labels"]) for side in (one, other)], "rejected": [0, 1], "index": number}


def told_row(number: int) -> dict[str, Any]:
    contexts = {"contexts": ["a", "bcd"], "bad_context": "xy" if number else None}
    return given(number) | {"asked": "?", "context": "told", "prompt_length": 2} | contexts


class Kind:
    """Rows of one kind: `groups` of them, `collate`d by a layout, and the networks that read them."""

    def __init__(self, groups: Callable[[], list[Group]], networks: Callable[[], Batch], collate: Any = None):
        self.groups, self.networks = groups, networks
        self.collate = collate or (lambda layout: Collator(0, layout=layout))

    def batch(self, groups: Sequence[tuple[Group, float | None]], layout: str = "padded") -> Batch:
        """Lay out groups, each with its weight or None."""
        rows, written = [], []
        for group, weight in groups:
            for one in group:
                row = as_row(one, masked=False) if isinstance(one, Written) else one
                rows.append(row if weight is None else row | {"weight": weight})
                written.append(one if isinstance(one, Written) else None)
        batch = self.collate(layout)(rows)
        if any(one is not None for one in written):
            batch |= describe(batch, rows, written)
        return _double(batch)


def _double(batch: Batch) -> Batch:
    kept = {"weight"}  # float32, as collators give it
    return {
        name: _double(value) if isinstance(value, dict) else value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in kept else value
        for name, value in batch.items()
    }  # fmt: skip


@cache
def text_networks() -> Batch:
    nets = {"student": Predictor(llama(1)), "teacher": LocalTeacher(llama(2))}
    return nets | {name: Predictor(llama(3)) for name in ("previous", "reference", "old", "average")}


def adaptive_networks() -> Batch:
    student = make_adaptive(described_as_adaptive(llama(1)))
    for layer in adaptive_layers(student).values():
        torch.nn.init.normal_(layer.choice[2].weight)
    return {"student": Predictor(student.double()), "teacher": LocalTeacher(llama(2))}


def described_as_adaptive(model: Any) -> Any:
    described(model.config, None, 4)
    return model


@cache
def masked_networks() -> Batch:
    nets = {"student": Predictor(tiny_masked(1)), "teacher": LocalTeacher(tiny_masked(2))}
    assert nets["student"].mask_id == MASK
    return nets | {name: Predictor(tiny_masked(3)) for name in ("reference", "old")}


@cache
def pair_networks(ours: str) -> Batch:
    sizes = [len(reader(kind)) for kind in (ours, "tiny")]
    return {"student": Predictor(llama(1, vocab=sizes[0])), "teacher": LocalTeacher(llama(2, vocab=sizes[1]))}


@cache
def visual_networks() -> Batch:
    return {"student": Predictor(tiny_vlm(1).double()), "teacher": LocalTeacher(tiny_vlm(2).double())}


def _told(layout: Any) -> ContextCollator:
    spell: Any = lambda asked, context: [1 + ord(letter) % 30 for letter in context]  # noqa: E731
    return ContextCollator(Collator(0, layout=layout), spell)


def _masked_row(number: int) -> dict[str, Any]:
    row = given(number)
    read = [2 + token % 9 for token in row["input_ids"]]
    return row | {"input_ids": read, "labels": [IGNORE_INDEX] * 2 + read[2:]}


def _masked_own(number: int, sample: int) -> Written:
    one = own(number, sample)
    done = replace(one.completion, ids=[2 + token % 9 for token in one.completion.ids])
    return replace(
        one, row=given(number), prompt=_masked_row(number)["input_ids"][:2], completion=done, context_prompt=None
    )


def _pairs(ours: str) -> Kind:
    def collate(layout: Any) -> PairCollator:
        return PairCollator(Collator(0, layout), Collator(0, layout), reader(ours), reader("tiny"))

    return Kind(
        lambda: [[row] for row in cache(paired_rows)(ours=ours, theirs="tiny")[:3]],
        lambda: pair_networks(ours),
        collate,
    )


def plain(one: Written) -> Written:
    return replace(one, row=given(one.row["index"]), context_prompt=None)


KINDS = {
    "given": Kind(lambda: [[given(n)] for n in range(3)], text_networks),
    "adaptive": Kind(lambda: [[given(n)] for n in range(3)], adaptive_networks),
    "preferences": Kind(lambda: [[preference(n)] for n in range(3)], text_networks),
    "own": Kind(lambda: [[plain(own(n, s)) for s in range(2)] for n in range(3)], text_networks),
    "both": Kind(lambda: [[given(n), plain(own(n, 0))] for n in range(3)], text_networks),
    "turns": Kind(lambda: [[plain(own(n, s, turns=2)) for s in range(2)] for n in range(3)], text_networks),
    "told": Kind(lambda: [[told_row(n)] for n in range(3)], text_networks, _told),
    "told_own": Kind(lambda: [[own(n, s) for s in range(2)] for n in range(3)], text_networks, _told),
    "pairs": _pairs("unigram-tiny"),
    "bytes": _pairs("bytes"),
    "masked": Kind(lambda: [[_masked_row(n)] for n in range(3)], masked_networks),
    "masked_own": Kind(lambda: [[_masked_own(n, s) for s in range(2)] for n in range(3)], masked_networks),
    "visual": Kind(
        lambda: [[row] for row in rendered(3, images=2)],
        visual_networks,
        lambda _: ImageTextCollator(processor(4), 200),
    ),
}


def networks_of(method: Method, kind: Kind) -> Batch:
    """The networks of a kind, with those that the method trains beside the student."""
    nets = dict(kind.networks())
    torch.manual_seed(7)
    for name, role in method.roles.items():
        if isinstance(role, Trainable) and role.make is not None:
            nets[name] = role.make(nets["student"], nets["teacher"]).double()
    return nets


def reduced(method: Method, nets: Batch, batches: Sequence[Batch], how: str = "losses") -> tuple[torch.Tensor, Batch]:
    """The loss of one optimiser step of these micro-batches and the means beside it, by the trainer's own reducer."""
    alone = SimpleNamespace(num_processes=1, reduce=lambda values, **_: values)
    run: Any = SimpleNamespace(method=method, accelerator=alone, data_ranks=1, _computed=set())
    run._means, run._followed = (defaultdict(lambda: torch.zeros(())) for _ in range(2))
    counts = DistillTrainer._get_num_items_in_batch(run, list(batches), torch.device("cpu"))
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        found = method.losses(nets, batch, frozenset({"student"}), STEP) if how == "losses" else None
        found = method.evaluate(nets, batch, STEP) if found is None else found
        for terms in [found] if isinstance(found, Terms) else found:
            loss = loss + DistillTrainer._reduce(run, terms, counts)
    return loss, {name: torch.as_tensor(value).double() for name, value in {**run._means, **run._followed}.items()}


def gradient(loss: torch.Tensor, nets: Batch) -> torch.Tensor:
    """The gradient in all that trains, as one vector."""
    trained = [net.module if isinstance(net, Predictor) else net for net in nets.values()]
    parameters = [p for net in trained if isinstance(net, torch.nn.Module) for p in net.parameters() if p.requires_grad]
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])
