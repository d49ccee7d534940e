"""Signals: some rows of any of them."""

import torch

from kdlm.signal import Dense, Draws, Head, Hidden, LogProbs, Mixture, Sampled, TopK, take


def test_rows_are_taken_in_the_order_asked_for():
    index = torch.tensor([3, 0, 3])
    ids, draw = torch.arange(20).view(5, 4), torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=draw)
    head = Head(torch.randn(7, 4, generator=draw))
    few = Draws(ids, x, x)
    signals = [
        (Dense(x), lambda s: [s.logits]),
        (Hidden(x, head), lambda s: [s.hidden]),
        (TopK(ids, x, few), lambda s: [s.log_probs, s.draws.log_probs, s.draws.counts]),
        (Sampled(ids, x), lambda s: [s.counts]),
        (LogProbs(x[:, 0]), lambda s: [s.log_probs]),
        (Mixture((Dense(x), Hidden(x, head)), x[:, :2]), lambda s: [s.log_weights, s.members[0].logits]),
    ]
    for signal, parts in signals:
        taken = take(signal, index)
        assert type(taken) is type(signal)
        for some, whole in zip(parts(taken), parts(signal), strict=True):
            assert torch.equal(some, whole[index])
    assert torch.equal(take(TopK(ids, x, few), index).ids, ids[index])
    assert take(TopK(ids, x), index).draws is None


def test_gradient_flows_through_taken_rows():
    x = torch.ones(3, 2, requires_grad=True)
    taken = take(Dense(x), torch.tensor([2, 2]))
    taken.logits.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0, 0], [0, 0], [2, 2]]
