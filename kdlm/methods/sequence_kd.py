"""Sequence-level distillation: the student is fine-tuned on text that the teacher wrote."""

from typing import ClassVar, Literal

from kdlm.losses import CrossEntropy
from kdlm.methods.tokens import TokenMethod, TokenOptions


class SequenceKD(TokenMethod):
    """Cross-entropy on the teacher's own text (Kim and Rush 2016, arXiv 1606.07947): needs no teacher while training.

    On text by other authors this is ordinary fine-tuning, the baseline of every comparison. A teacher, if there is
    one, is asked in evaluation only.
    """

    paper = "arXiv 1606.07947"
    needs = frozenset({"labels"})


class SequenceKDSection(TokenOptions):
    """Fine-tune on teacher-written text: cross-entropy only; a teacher is optional and used in evaluation."""

    method: ClassVar = SequenceKD
    name: Literal["sequence_kd"] = "sequence_kd"

    def build(self, losses, vocab) -> TokenMethod:
        if others := [loss.name for loss in losses if loss.name != "cross_entropy"]:
            raise ValueError(f"losses: sequence_kd takes cross_entropy only, not {', '.join(others)}; use logit_kd")
        return super().build(losses or [CrossEntropy()], vocab)
