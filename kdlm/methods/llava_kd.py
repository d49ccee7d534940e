"""LLaVA-KD: a small vision-language model follows a large one in its answers, at its images and between its images'
tokens."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdlm.losses import IGNORE_INDEX, Divergence, Loss, correlation_distance, kept_rows, measures_for
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.signal import Dense, Hidden, Rows, summed, weights_of


class LlavaKD(TokenMethod):
    """Match distributions at answers and images, and the relations of image tokens (ICCV 2025, arXiv 2410.16236).

        loss = mean over answer tokens of the losses
             + visual   * mean over image tokens of those losses that look at no label   (MDist)
             + relation * mean over images of `correlation_distance`                      (RDist)

    The distribution at an image token is that of what follows it, and has no label: cross-entropy is never taken there.
    RDist compares the last hidden states, after the final norm, at the tokens of one image with each other. The paper's
    three stages are three recipes in which other parts of the student train (`student.trainable`).

    Unverified, because the training code was not released when this was written: the form of RDist, the layer that it
    looks at, and the weights (1 and 0.5, from memory of the paper).

    Args:
        losses: token losses; with a `visual` weight above 0 at least one of them is a divergence.
        visual: weight of the divergences at image tokens.
        relation: weight of the relations between image tokens.
        distance: between two images' relations, `cosine` or `mse`.
    """

    paper = "arXiv 2410.16236"
    needs = frozenset({"labels", "visual", "teacher", "teacher.layers"})
    weighs = True

    def __init__(
        self,
        losses: Sequence[Loss] = (),
        *,
        visual: float = 1.0,
        relation: float = 0.5,
        distance: Literal["cosine", "mse"] = "cosine",
        **options: Any,
    ):
        super().__init__(losses, **options)
        self.visual, self.relation = visual, relation
        self.distance: Literal["cosine", "mse"] = distance

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        visual, weights = batch["visual"], weights_of(batch)
        images = (visual.amax() + 1).clamp(min=0)
        if weights is not None:
            images = of_images(batch, weights).sum(dtype=torch.float64)
        return super().counts(batch) | {"visual": summed(visual >= 0, weights), "images": images}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        return self._match(nets, batch, step)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms, and every measure that can be taken with this teacher."""
        return self._match(nets, batch, step, measured=True)

    def _match(self, nets: Nets, batch: Batch, step: Step, *, measured: bool = False) -> Terms:
        answers = kept_rows(batch["labels"], weights_of(batch))
        looks = self.visual or self.relation
        seen = visual_rows(batch["visual"] if looks else torch.full_like(batch["visual"], -1), weights_of(batch))
        # One pass of each model for both: the rows of the answers, and below them those of the images.
        every = Rows(torch.cat([answers.index, seen.index]), torch.cat([answers.labels, seen.labels]))
        teacher, student = nets["teacher"](batch, every), nets["student"](batch, every)
        at = slice(len(answers)), slice(len(answers), None)
        (ours, ours_seen), (theirs, theirs_seen) = ([part(one, rows) for rows in at] for one in (student, teacher))
        told = self.compare(ours, theirs, answers, step, measures_for(type(teacher)) if measured else ())
        terms, metrics = dict(told.terms), dict(told.metrics)
        if self.visual:
            chosen = [one for one in self.weighted(step) if isinstance(one[1], Divergence)]
            there = self.compare(ours_seen, theirs_seen, seen, step, weighted=chosen)
            terms["visual"] = Term(there.terms["token_loss"].sum, "visual", self.visual)
        if self.relation:
            image = batch["visual"].flatten().index_select(0, seen.index)
            related = self._related(ours_seen, theirs_seen, image)
            weights = weights_of(batch)
            weights = None if weights is None else of_images(batch, weights)
            terms["relation"] = Term(summed(related, weights), "images", self.relation)
        return Terms(terms, metrics)

    def _related(self, student: Hidden | Dense, teacher: Hidden | Dense, image: Int[Tensor, "rows"]) -> Tensor:
        for role, signal in (("student", student), ("teacher", teacher)):
            if not isinstance(signal, Hidden):
                raise ValueError(
                    f"method.relation: the {role} gives no hidden states (its logits are not head(hidden), or "
                    "teacher.signal is dense); set relation: 0"
                )
        (ours, there), (theirs, _) = (by_image(signal.hidden, image) for signal in (student, teacher))
        return correlation_distance(ours, theirs, there, self.distance)


def visual_rows(visual: Int[Tensor, "batch length"], weights: Float[Tensor, "batch length"] | None = None) -> Rows:
    """Return the rows of the image tokens, image by image; their labels are IGNORE_INDEX."""
    flat = visual.flatten()
    index = (flat >= 0).nonzero().squeeze(-1)
    return Rows(index, torch.full_like(index, IGNORE_INDEX), None if weights is None else weights.flatten()[index])


def of_images(batch: Batch, weights: Float[Tensor, "batch length"]) -> Float[Tensor, "images"]:
    """Return what is known of each token for each image of a batch: that of its first token."""
    flat = batch["visual"].flatten()
    places = (flat >= 0).nonzero().squeeze(-1)
    return weights.flatten()[places[torch.diff(flat[places], prepend=flat.new_tensor([-1])) > 0]]


def part(signal: Hidden | Dense, rows: slice) -> Hidden | Dense:
    """Return what a signal says of some of its rows."""
    return Hidden(signal.hidden[rows], signal.head) if isinstance(signal, Hidden) else Dense(signal.logits[rows])


def by_image(
    hidden: Float[Tensor, "rows width"], image: Int[Tensor, "rows"]
) -> tuple[Float[Tensor, "images longest width"], Bool[Tensor, "images longest"]]:
    """Return rows, of which those of an image follow one another, image by image, and which places are no padding."""
    sizes = torch.unique_consecutive(image, return_counts=True)[1]
    if not len(sizes):
        return hidden[None][:0], hidden.new_zeros((0, 0), dtype=torch.bool)
    longest = int(sizes.max())
    there = torch.arange(longest, device=hidden.device) < sizes[:, None]
    return pad_sequence(list(hidden.split(sizes.tolist())), batch_first=True), there


class LlavaKDSection(TokenOptions):
    """Match a vision-language teacher at answers, at image tokens, and in the relations between image tokens."""

    method: ClassVar = LlavaKD
    name: Literal["llava_kd"] = "llava_kd"
    visual: float = Field(1.0, ge=0)
    """Weight of the losses at image tokens, of those that look at no label; 0 leaves images out."""
    relation: float = Field(0.5, ge=0)
    """Weight of the relations between the tokens of an image."""
    distance: Literal["cosine", "mse"] = "cosine"
    """Between the relations of student and teacher: 1 - cos, or the mean of squares."""

    def build(self, losses, vocab) -> TokenMethod:
        if self.visual and not any(isinstance(loss, Divergence) for loss in losses):
            raise ValueError(
                "losses: llava_kd compares distributions at images too: add e.g. {name: forward_kl}, or set "
                "method.visual: 0"
            )
        return super().build(losses, vocab)
