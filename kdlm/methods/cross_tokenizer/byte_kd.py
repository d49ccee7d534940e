"""Plain distillation of a student that reads bytes: the teacher's own law of the next byte, at every byte."""

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.data.byte_order import BYTES, ByteOrder, is_of_bytes, letters_of
from kdlm.data.paired_vocabulary import PairedVocabulary
from kdlm.methods.cross_tokenizer.aligned import AlignedMethod, AlignedOptions, Readings, parted
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.signal import Dense, Hidden, take
from kdlm.spelling import Spelling

BLOCK = 1 << 24
"""Entries of the teacher's logits that are made at once."""


class ByteKD(AlignedMethod):
    """The recipe's token losses at every byte of the text, against what the teacher says of the next byte.

    A teacher of tokens says of the first byte of a token what its tokens say that begin with it, added up. Of a later
    one it says the same among the tokens that begin with the bytes so far and are longer: the text's token is one of
    them. So every byte has a whole distribution, from one pass of the teacher. On text of the teacher, read in the
    tokens that it wrote, the mean over texts is its exact law of the next byte: that a token goes on, or has ended, is
    what the text says itself. (The exact law of a single text would ask for every tokenization of its last bytes: arXiv
    2410.09303.)

    Byte-level distillation (BLD, arXiv 2604.07466) brings a teacher's probabilities to bytes too, and gives a student
    of tokens a second head that says bytes; here the student reads bytes. Of that paper only the abstract was read.

    Args:
        losses: those that compare with the teacher, such as forward_kl or jsd, and those of the student alone.
    """

    paper = "arXiv 2604.07466"

    def __init__(self, losses=(), **options: Any):
        own, self.compared = parted(losses, "byte_kd")
        super().__init__(own, **options)

    def introduce(self, ours: Spelling, theirs: Spelling) -> None:
        """Hear both tokenizers. Raises ValueError for a student whose tokens are not bytes."""
        if not is_of_bytes(ours):
            raise ValueError("byte_kd is for a student whose tokens are the 256 bytes: use alm or gold")
        letters = letters_of(ours)
        self.theirs, self.order = theirs, ByteOrder(theirs)
        self.letters = torch.tensor([letters[bytes([v])] for v in range(BYTES)])
        pairs = zip(*PairedVocabulary(ours, theirs).matched, strict=True)
        self.closing = torch.tensor([(i, t) for i, t in pairs if i in ours.control]).reshape(-1, 2)

    def match(self, readings: Readings, nets: Nets, batch: Batch, step: Step) -> Terms:
        rows, law = self.law(readings)
        weighted = [(n, loss, loss.weight_at(step.progress, step.index)) for n, loss in self.compared.items()]
        kept = readings.rows.take(rows)
        found = self.compare(take(readings.student, rows), Dense(law), kept, step, (), weighted)
        said = (kept.sum(torch.ones(len(rows), device=law.device)), "tokens")
        return Terms({"byte_kd": Term(found.terms["token_loss"].sum)}, found.metrics | {"bytes_compared": said})

    @torch.no_grad()
    def law(self, readings: Readings) -> tuple[Int[Tensor, "n"], Float[Tensor, "n vocab"]]:
        """Return the student's rows at which the teacher has a law of the next byte, and its logarithm over the
        student's ids."""
        teacher = readings.teacher
        assert isinstance(teacher, Hidden | Dense)
        device, wide = readings.rows.index.device, teacher.logits if isinstance(teacher, Dense) else teacher.hidden
        rows, their_rows, places, begins = self._bytes(readings)
        law = torch.zeros(
            len(rows), readings.student.vocab_size, device=device, dtype=torch.promote_types(wide.dtype, torch.float32)
        )
        order, letters, closing = (x.to(device) for x in (torch.from_numpy(self.order.ids), self.letters, self.closing))
        size = max(1, BLOCK // teacher.vocab_size)
        for start in range(0, len(readings.their_rows), size):
            at = slice(*torch.searchsorted(their_rows, torch.tensor([start, start + size], device=device)).tolist())
            block = take(teacher, torch.arange(start, min(start + size, len(readings.their_rows)), device=device))
            logits = block.head.logits(block.hidden) if isinstance(block, Hidden) else block.logits
            p = logits.softmax(-1, dtype=law.dtype)
            mass = p[:, order.clamp(max=p.shape[1] - 1)].double() * (order < p.shape[1])  # tokens beyond the head: none
            below = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))
            of = their_rows[at] - start
            law[at, letters] = below[of].gather(1, places[at]).diff(dim=-1).clamp(min=0).to(law.dtype)
            law[at, closing[:, 0]] = begins[at, None] * p[of][:, closing[:, 1]]
        tiny = torch.finfo(law.dtype).tiny
        return rows, (law / law.sum(-1, keepdim=True).clamp(min=tiny)).clamp(min=tiny).log()

    def _bytes(self, readings: Readings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return, of each byte that has a law, in the order of the text: the student's row, the teacher's, the places
        in `order` of the tokens that go on there, and whether a token begins.

        Left out are chunks in which the teacher's tokens are not one, or not of the student's bytes (the space that
        SentencePiece writes before a text).
        """
        tokens = readings.their_rows.labels.cpu().numpy()
        starts, sizes = _runs(readings.chunks)
        their_starts, their_sizes = _runs(readings.their_chunks)
        found: list[tuple[int, int, np.ndarray, bool]] = []
        for start, size, their_start, their_size in zip(starts, sizes, their_starts, their_sizes, strict=True):
            token = int(tokens[their_start])
            piece = b"." if token in self.theirs.control else self.theirs.pieces[token] or b""
            if their_size == 1 and size == len(piece):
                places = (self.order.continuations(piece[:n]) for n in range(size))
                found += [(start + n, their_start, where, n == 0) for n, where in enumerate(places)]
        device = readings.rows.index.device
        rows, their_rows, begins = (torch.tensor([one[k] for one in found], dtype=torch.long) for k in (0, 1, 3))
        places = torch.from_numpy(np.array([one[2] for one in found], dtype=np.int64).reshape(-1, BYTES + 1))
        return rows.to(device), their_rows.to(device), places.to(device), begins.to(device)


def _runs(chunks: Int[Tensor, "rows"]) -> tuple[list[int], list[int]]:
    """Return where the rows of each chunk begin, and how many there are."""
    numbers = chunks.cpu().numpy()
    places = np.flatnonzero(numbers >= 0)
    _, first, sizes = np.unique(numbers[places], return_index=True, return_counts=True)
    return places[first].tolist(), sizes.tolist()


class ByteKDSection(AlignedOptions):
    """Plain distillation of a student that reads bytes, by any of the recipe's losses."""

    method: ClassVar = ByteKD
    name: Literal["byte_kd"] = "byte_kd"
