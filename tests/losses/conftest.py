"""What the tests of this room share: every divergence with its options, and seeded float64 tensors."""

from functools import partial

import jaxtyping
import pytest
import torch
from linear_pair import ROWS, STUDENT, TEACHER, VOCAB

from kdlm.losses import (
    adaptive_kl,
    alpha_mixture,
    confidence_aware_kl,
    decoupled_kl,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    taid_kl,
    topk_divergence,
    total_variation,
    tvd_plus_plus,
)
from kdlm.signal import Head, Hidden

DIFFERENTIABLE = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "jsd": partial(generalised_jsd, beta=0.3),
    "jsd_normalised": partial(generalised_jsd, beta=0.1, normalised=True),
    "tvd": total_variation,
    "alpha_mixture_0": alpha_mixture,
    "alpha_mixture_geometric": partial(alpha_mixture, alpha=1.0, share=0.4),
    "alpha_mixture_harmonic": partial(alpha_mixture, alpha=3.0, share=0.4),
    "topkld": partial(topk_divergence, k=3),
    "cakld": confidence_aware_kl,
    "cakld_given": partial(confidence_aware_kl, confidence=0.3),
    "dkd_without_labels": partial(decoupled_kl, beta=2.0),
}
# These hold a part of the student fixed, so finite differences do not see the gradient that is meant.
PARTLY_DETACHED = {"adaptive_kl": adaptive_kl, "taid": partial(taid_kl, t=0.4), "tvd_plus_plus": tvd_plus_plus}


@pytest.fixture(params=[*DIFFERENTIABLE, *PARTLY_DETACHED])
def divergence(request):
    """Every divergence of the room."""
    return (DIFFERENTIABLE | PARTLY_DETACHED)[request.param]


@pytest.fixture(params=list(DIFFERENTIABLE))
def differentiable(request):
    """Every divergence through which gradient flows wherever the student occurs."""
    return DIFFERENTIABLE[request.param]


@pytest.fixture
def draw():
    """Return a function that draws a standard normal tensor of a shape; the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return normal


@pytest.fixture
def unchecked_types():
    """Let wrong arguments through to kdlm's own checks, as they get through for its users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def models(draw):
    """Student (all of it trained) and teacher of odd sizes, in float64."""

    def build(rows=ROWS, vocab=VOCAB, dtype=torch.float64, teacher_vocab=None, **head):
        bias = draw(vocab, dtype=dtype).requires_grad_() if head.pop("bias", False) else None
        hidden, weight = (draw(n, STUDENT, dtype=dtype).requires_grad_() for n in (rows, vocab))
        student = Hidden(hidden, Head(weight, bias, **head))
        n = vocab if teacher_vocab is None else teacher_vocab
        return student, Hidden(draw(rows, TEACHER, dtype=dtype), Head(draw(n, TEACHER, dtype=dtype)))

    return build
