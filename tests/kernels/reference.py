"""Every divergence with its options, and the eager losses of kdlm on whole logits that the kernels are held against."""

import torch

import kdlm.losses

CASES = {
    "forward_kl": ("forward_kl", {}),
    "reverse_kl": ("reverse_kl", {}),
    "skew_kl": ("skew_kl", {"skew": 0.2}),
    "skew_kl_0": ("skew_kl", {"skew": 0.0}),
    "skew_reverse_kl": ("skew_reverse_kl", {"skew": 0.2}),
    "jsd": ("generalised_jsd", {"beta": 0.3}),
    "jsd_0": ("generalised_jsd", {"beta": 0.0}),
    "jsd_1": ("generalised_jsd", {"beta": 1.0}),
    "jsd_normalised": ("generalised_jsd", {"beta": 0.1, "normalised": True}),
    "tvd": ("total_variation", {}),
    "adaptive_kl": ("adaptive_kl", {"head_mass": 0.6}),
    "alpha_0": ("alpha_mixture", {"alpha": 0.0, "share": 0.3}),
    "alpha_arithmetic": ("alpha_mixture", {"alpha": -1.0, "share": 0.3}),
    "alpha_geometric": ("alpha_mixture", {"alpha": 1.0, "share": 0.3}),
    "alpha_harmonic": ("alpha_mixture", {"alpha": 3.0, "share": 0.3}),
    "taid_kl": ("taid_kl", {"t": 0.4}),
}
"""Name of the test, name of the divergence, options."""
PARTLY_DETACHED = ("adaptive_kl", "taid_kl")
"""They hold a part of the student fixed, so finite differences do not see the gradient that is meant."""


def logits(hidden, head):
    """The model's logits, by the book."""
    raw = hidden @ head.weight.T if head.bias is None else hidden @ head.weight.T + head.bias
    raw = raw * head.logit_scale
    return raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)


def rows(name, student, teacher, **options):
    """The divergence of every row of logits."""
    return getattr(kdlm.losses, name)(student, teacher, **options)


def leaves(hidden, head):
    """What is trained."""
    return [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad]


def assert_same(ours, expected, inputs, upstream=None, **tolerance):
    """Compare values, and gradients of their (weighted) sum."""
    torch.testing.assert_close(ours, expected, **tolerance)
    factor = 1 if upstream is None else upstream
    found, plain = (torch.autograd.grad((x * factor).sum(), inputs, retain_graph=True) for x in (ours, expected))
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
