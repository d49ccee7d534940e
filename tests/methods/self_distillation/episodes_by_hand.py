"""Episodes written by hand, as batches, and a student whose next token depends on all that it has read."""

from typing import Any

import torch
from torch import Tensor

from kdlm.data import Collator
from kdlm.methods import Method, Step, Terms
from kdlm.rollouts import SAID
from kdlm.rollouts.rows import beside
from kdlm.signal import IGNORE_INDEX, Dense, sequence_of

VOCAB = 11
NAN = float("nan")
RETRIES = [  # prompt, its number, [(tokens, turn, or SAID)], rewards of the turns
    ([1, 2], 0, [([3, 4], 0), ([5, 6], SAID), ([7, 8, 9], 1)], [0.0, 1.0]),
    ([1, 2], 0, [([3], 0), ([5], SAID), ([7, 8], 1)], [1.0, 0.0]),
    ([1, 2], 0, [([4, 5, 6, 7], 0)], [1.0]),
    ([9], 1, [([3, 4], 0), ([5, 6, 10], SAID), ([7], 1)], [0.0, 0.0]),
    ([9], 1, [([6], 0), ([5, 6, 10], SAID), ([7, 2, 2], 1)], [0.0, 1.0]),
]


class Reader:
    """Logits by the sum of the tokens so far, weighed by their places: any other prefix has others."""

    def __init__(self, seed: int = 3):
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.randn(97, VOCAB, generator=draw, dtype=torch.float64).requires_grad_()

    def states(self, batch: dict[str, Tensor]) -> Tensor:
        ids, number = batch["input_ids"].flatten(), sequence_of(batch).flatten()
        state, before, found = 0, -1, []
        for token, sequence in zip(ids.tolist(), number.tolist(), strict=True):
            state = (31 * (state if sequence == before else 7) + token + 1) % 97
            before = sequence
            found.append(state)
        return torch.tensor(found).view_as(batch["input_ids"])

    def __call__(self, batch: dict[str, Tensor], rows: Any) -> Dense:
        return Dense(self.table[rows.select(self.states(batch))])

    def logs(self, before: list[int], tokens: list[int]) -> Tensor:
        """Return `log q` over the vocabulary at each of some tokens that follow others."""
        ids = torch.tensor([before + tokens])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return self.table[self.states(batch)[0, len(before) - 1 : -1]].log_softmax(-1)

    def nats(self, before: list[int], tokens: list[int]) -> Tensor:
        """Return the sum of `-log q` of tokens that follow others."""
        return -self.logs(before, tokens)[torch.arange(len(tokens)), tokens].sum()


def batch_of(episodes: list[Any], layout: str = "padded", drawn_from: Reader | None = None) -> dict[str, Any]:
    """Lay out episodes; their log-probabilities are those of `drawn_from`, or 0."""
    rows, turns, logs = [], [], []
    for prompt, index, parts, _ in episodes:
        said = [(token, turn) for ids, turn in parts for token in ids]
        labels = [token if turn != SAID else IGNORE_INDEX for token, turn in said]
        ids = prompt + [token for token, _ in said]
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * len(prompt) + labels, "index": index})
        turns.append([SAID] * len(prompt) + [turn for _, turn in said])
        own = turns[-1] if drawn_from is not None else [SAID] * len(ids)
        writer = drawn_from or Reader()
        logs.append([-writer.nats(ids[:n], [ids[n]]).item() if turn != SAID else 0.0 for n, turn in enumerate(own)])
    batch: dict[str, Any] = Collator(0, layout=layout)(rows)  # type: ignore[arg-type]
    width = max(len(rewards) for *_, rewards in episodes)
    return batch | {
        "turn": beside(batch, turns, torch.int64, SAID),
        "sampled": beside(batch, [[turn != SAID for turn in row] for row in turns], torch.bool),
        "log_probs": beside(batch, logs, torch.float64),
        "sequence": beside(batch, [[n] * len(row) for n, row in enumerate(turns)], torch.int64),
        "turn_rewards": torch.tensor([r + [NAN] * (width - len(r)) for *_, r in episodes], dtype=torch.float64),
        "reward": torch.tensor([rewards[-1] for *_, rewards in episodes], dtype=torch.float64),
        "truncated": torch.zeros(len(episodes), dtype=torch.bool),
    }


def run(method: Method, student: Reader, batch: dict[str, Any], teacher: Any = None) -> Terms:
    nets = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    found = method.losses(nets, batch, frozenset({"student"}), Step(0, 10))
    assert isinstance(found, Terms)
    return found


def gradient(total: Tensor | Terms, student: Reader) -> Tensor:
    if isinstance(total, Terms):
        total = torch.stack([term.weight * term.sum for term in total.terms.values()]).sum()
    return torch.autograd.grad(total, student.table, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
