"""Blend: the logits of a mixture of teachers, one chunk of rows at a time, whatever the number of teachers."""

import torch
from jaxtyping import Float
from kdlm_kernels import plan_chunks
from kdlm_kernels.chunks import free_bytes
from kdlm_kernels.distribution import blocks
from kdlm_kernels.projection import product_dtype, project, wide_dtype
from torch import Tensor

from kdlm.losses.vocabulary import Vocab, cut
from kdlm.signal import Head, Hidden, Mixture


class Blend:
    """Projects the members of a mixture one after the other and averages them as it goes.

    A chunk costs two buffers `[n, vocab]`: the average, and the logits of the member that is being taken in.

    Args:
        mixture: its heads cut to `vocab` already, where that is a number.
        vocab: ids that both tokenizers share, to which every member is cut before its softmax.
    """

    def __init__(self, mixture: Mixture, vocab: Vocab):
        self.mixture, self.vocab = mixture, vocab
        # Autocast decides here: the sweep itself runs outside of it.
        self.factors = [product_dtype(m.hidden if isinstance(m, Hidden) else m.logits) for m in mixture.members]
        self.dtype = torch.float32
        for factor in self.factors:
            self.dtype = torch.promote_types(self.dtype, wide_dtype(factor))
        first = mixture.members[0].vocab_size
        self.ids = first if vocab is None else vocab if isinstance(vocab, int) else len(vocab)

    def __call__(self, at: slice) -> Float[Tensor, "n shared"]:
        """Return the mixture's logits at the rows `at`, over the shared ids."""
        rows, device = at.stop - at.start, self.mixture.log_weights.device
        begin = -torch.inf if self.mixture.space == "probability" else 0.0
        total = torch.full((rows, self.ids), begin, dtype=self.dtype, device=device)
        mass = torch.full((rows, 1), -torch.inf, dtype=self.dtype, device=device)
        for number in range(len(self.mixture.members)):
            raw = self._products(number, at)
            for local in blocks(rows, self.ids, device):
                block = slice(at.start + local.start, at.start + local.stop)
                logits = cut(self._transformed(number, raw[local]), self.vocab)
                self.mixture.add(number, logits, block, total[local], mass[local])
            del raw  # before the next member's takes its place
        return total

    def _products(self, number: int, at: slice) -> Tensor:
        member = self.mixture.members[number]
        if not isinstance(member, Hidden):
            return member.logits[at].detach()
        hidden = member.hidden[at].detach().to(self.factors[number])
        out = hidden.new_empty(len(hidden), member.head.vocab_size, dtype=wide_dtype(hidden.dtype))
        bias = None if member.head.bias is None else member.head.bias.detach()
        project(out, hidden, member.head.weight.detach(), bias)
        return out

    def _transformed(self, number: int, raw: Tensor) -> Tensor:
        member = self.mixture.members[number]
        return member.head.transform(raw) if isinstance(member, Hidden) else raw

    def chunk_rows(self, source: Tensor, student: Head | None) -> int:
        """Return the rows of a chunk, such that the buffers of student and mixture keep to the limits of the losses."""
        vocab, width = (source.shape[1], source.shape[1]) if student is None else student.weight.shape
        widths = sum(m.hidden.shape[1] for m in self.mixture.members if isinstance(m, Hidden))
        return plan_chunks(
            max(1, len(source)),
            vocab=vocab,
            student_width=width,
            # Two buffers, of which each member's product fills one: the same traffic and work as all heads in a row.
            teacher_width=max(1, widths // 2),
            teacher_vocab=2 * self.ids,
            itemsize=product_dtype(source).itemsize,
            device=source.device.type,
            trained=student is not None and student.weight.requires_grad,
            free=free_bytes(source.device),
        ).rows
