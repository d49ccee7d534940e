"""Distillation of classifiers of texts: what `image_kd` is, of a text for an image."""

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses import Loss
from kdlm.methods.method import Batch, Step, Terms
from kdlm.methods.vision.image_kd import ImageKD
from kdlm.section import Section

READ = ("input_ids", "attention_mask", "token_type_ids")


class ClassKD(ImageKD):
    """Sum losses over the texts of a batch, each with its class (Hinton et al. 2015, arXiv 1503.02531).

    A text is a row and its class the token: losses that look at labels alone are divided by the number of texts that
    have one, those that listen to the teacher by that of all texts.
    """

    paced_by = "texts"
    unit = "texts"

    def read(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in READ if name in batch}

    def said(
        self,
        student: Float[Tensor, "texts classes"],
        teacher: Float[Tensor, "texts classes"] | None,
        labels: Int[Tensor, "texts"],
        step: Step,
        *,
        measured: bool,
    ) -> Terms:
        """Return the losses of logits as terms, and with `measured` what evaluation says of them."""
        terms, metrics = self.compared(student, teacher, labels, step)
        return Terms(terms, metrics | (self.judged(student, teacher, labels) if measured else {}))


class ClassKDSection(Section):
    """Match the teacher's classes of texts with the recipe's `losses`; cross-entropy alone is fine-tuning."""

    name: Literal["class_kd"] = "class_kd"

    def build(self, losses: Sequence[Loss], vocab: Any) -> ClassKD:
        """Return the method with the recipe's losses."""
        if not losses:
            raise ValueError(
                "losses: class_kd needs at least one, e.g. [{name: forward_kl}] or [{name: cross_entropy}]"
            )
        return ClassKD(losses)
