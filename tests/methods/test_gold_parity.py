"""TRL's GOLD, where it is right, and where it is not: the same logits to both."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdlm.losses import Hybrid, Matched, merged_divergence
from kdlm.signal import Dense

pytestmark = pytest.mark.filterwarnings("ignore")

VOCAB, THEIRS, TOKENS = 11, 13, 6


class Names:
    """As much of a tokenizer as TRL's loss asks for."""

    def __init__(self, names: str):
        self.names = names

    def get_vocab(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def trl_loss(merge: str, *, hybrid: bool, names: str, their_names: str, beta: float = 0.3) -> Any:
    from trl.experimental.gold.gold_trainer import ULDLoss

    config: Any = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.3,
        uld_teacher_temperature=1.3,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy=merge,
        uld_use_hybrid_loss=hybrid,
        beta=beta,
    )
    return ULDLoss(config, Names(names), Names(their_names))


def logits(vocab: int, seed: int) -> torch.Tensor:
    return torch.randn(1, TOKENS + 2, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def theirs_of(loss: Any, student: torch.Tensor, teacher: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Ask TRL about an answer of tokens 2 .. 7, of which each ends at these bytes on both sides."""
    labels = torch.tensor([[-100, -100, 1, 3, 5, 2, 4, 1]])
    offsets = torch.tensor([[[0, 0], [0, 0], *([a, b] for a, b in zip([0, *ends[:-1]], ends, strict=True))]])
    ids = labels.clamp(min=0)
    return loss(student, teacher, labels, labels, ids, ids, offsets, offsets)


def ours_of(
    student: torch.Tensor, teacher: torch.Tensor, matched: Matched, weights: tuple[float, float]
) -> torch.Tensor:
    """The same answer in groups of one token: its rows are those before each token."""
    nothing = torch.zeros(TOKENS)
    hybrid = Hybrid(matched, *weights, beta=0.3, temperature=1.3)
    rows = slice(1, 1 + TOKENS)
    return merged_divergence(Dense(student[0, rows]), Dense(teacher[0, rows]), nothing, nothing, hybrid)[0].mean()


ENDS = [1, 2, 4, 5, 8, 9]


def test_sorted_l1_of_groups_of_one_token_is_that_of_trl() -> None:
    student, teacher = logits(VOCAB, 0), logits(THEIRS, 1)
    loss = trl_loss("bayesian", hybrid=False, names="abcdefghijk", their_names="abcdefghijklm")
    none = torch.empty(0, dtype=torch.long)
    ours = ours_of(student, teacher, Matched.of(none, none, VOCAB, THEIRS), (0.0, 1.0))
    torch.testing.assert_close(ours, theirs_of(loss, student, teacher, ENDS))


def test_the_hybrid_is_that_of_trl_where_all_tokens_are_matched() -> None:
    student, teacher = logits(VOCAB, 0), logits(VOCAB, 1)
    names = "abcdefghijk"
    loss = trl_loss("bayesian", hybrid=True, names=names, their_names=names[::-1])
    ids = torch.arange(VOCAB)
    ours = ours_of(student, teacher, Matched.of(ids, ids.flip(0), VOCAB, VOCAB), (1.0, 0.0))
    torch.testing.assert_close(ours, theirs_of(loss, student, teacher, ENDS), rtol=1e-5, atol=1e-6)


def test_where_some_are_matched_trl_leaves_out_the_rest_and_can_fall_below_0() -> None:
    """What TRL leaves out is one outcome, and with it the two agree."""
    student, teacher = logits(VOCAB, 0), logits(THEIRS, 1)
    loss = trl_loss("bayesian", hybrid=True, names="abcdefghijk", their_names="lmabcdnopqrst")
    total = theirs_of(loss, student, teacher, ENDS)
    ids = torch.arange(4)
    matched = Matched.of(ids, ids + 2, VOCAB, THEIRS)
    share = 4 / THEIRS
    ours = ours_of(student, teacher, matched, (share, 1 - share))
    q, p = ((x[0, 1 : 1 + TOKENS] / 1.3).softmax(-1) for x in (student, teacher))
    rest = torch.stack([1 - q[:, :4].sum(-1), 1 - p[:, 2:6].sum(-1)])
    middle = 0.3 * rest[1] + 0.7 * rest[0]
    left_out = (0.3 * rest[1] * (rest[1] / middle).log() + 0.7 * rest[0] * (rest[0] / middle).log()).mean()
    torch.testing.assert_close(ours - share * left_out, total, rtol=1e-5, atol=1e-6)
    forward = trl_loss("bayesian", hybrid=True, names="ab", their_names="ac", beta=0.0)
    assert forward._compute_jsd_loss_for_matched_tokens(torch.tensor([[0.5]]), torch.tensor([[0.3]])) < 0


def test_trls_observed_merge_reads_the_row_after_the_token() -> None:
    """A student that agrees with the teacher about every token of the answer is blamed for what comes after it."""
    student = logits(VOCAB, 0)
    teacher = student.clone()
    teacher[:, -1] += torch.arange(VOCAB) * 1.0  # predicts what follows the answer, which has no label
    names = "abcdefghijk"
    blamed = theirs_of(trl_loss("observed", hybrid=True, names=names, their_names=names), student, teacher, ENDS)
    ids = torch.arange(VOCAB)
    ours = ours_of(student, teacher, Matched.of(ids, ids, VOCAB, VOCAB), (1.0, 0.0))
    assert blamed > 0.01 and ours.abs() < 1e-6


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_trl_matches_tokens_by_strings_and_misses_those_with_a_space(merge: str) -> None:
    loss = trl_loss(merge, hybrid=True, names="aĠb", their_names="a\u2581b")
    assert sorted(loss._vocab_mapping) == [0, 2], "the space of byte-level BPE and SentencePiece's are two letters"
