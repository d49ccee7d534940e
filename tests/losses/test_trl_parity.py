"""Parity with TRL 1.16 and Liger 0.8.5, in their conventions: no squared temperature."""

import pytest
import torch

from kdlm.losses import chunked, generalised_jsd
from kdlm.signal import Head, Hidden


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_generalised_jsd_is_that_of_trls_gkd(draw, beta):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = draw(2, 5, 41).requires_grad_(), draw(2, 5, 41)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=0.9, reduction="sum")
    ours = generalised_jsd(student, teacher, beta=beta, temperature=0.9, t_squared=False).sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, student)[0], torch.autograd.grad(theirs, student)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_chunked_form_is_that_of_trls_distillation_trainer_and_of_liger(draw, beta):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden, weight = (draw(n, 6, dtype=torch.float32).requires_grad_() for n in (20, 127))
    teacher_hidden, teacher_weight = (draw(n, 10, dtype=torch.float32) for n in (20, 127))

    def with_gradients(loss):
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    student, teacher = Hidden(hidden, Head(weight)), Hidden(teacher_hidden, Head(teacher_weight))
    rows = chunked(lambda s, t: generalised_jsd(s, t, beta=beta), student, teacher, chunk_rows=7)
    ours = with_gradients(rows.sum() / 20)
    mask = torch.ones(1, 20, dtype=torch.long)
    trl, _, _ = _chunked_divergence_loss(hidden[None], teacher_hidden[None], weight, teacher_weight, mask, beta)
    liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    theirs = liger(hidden, weight, teacher_hidden, teacher_weight, torch.zeros(20, dtype=torch.long))
    for peer in (trl, theirs):
        for mine, other in zip(ours, with_gradients(peer), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
