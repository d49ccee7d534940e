"""The step `influence`: rows are weighed by what they do to the loss on a few clean ones (KD-AIF)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor

from kdlm.curation.gradients import Sketch, curvature, influences, weights_of_influence
from kdlm.curation.prompts import asked_of
from kdlm.curation.rows import read, with_columns
from kdlm.curation.step import Desk, Step, lacks
from kdlm.data.report import Unusable
from kdlm.data.sections import Source
from kdlm.data.sources import open_source
from kdlm.signal import Hidden
from kdlm.writers import LocalWriter, Refused
from kdlm.writers.scoring import Tokens


class Influence(Step):
    """Weighs rows by their influence on clean validation rows: KD-AIF (arXiv 2501.02705).

        I(n) = -mean_v grad l_v^T H^-1 grad l_n,    weight = a falling map of I, standardised

    l is the cross-entropy of a completion under the student, in mean over its tokens: a row's weight counts for each of
    them. Gradients are those of the last layer (the head), projected (`Sketch`); H is the empirical Fisher matrix of
    the rows, damped. The student should have been warmed up on the rows: what an untrained one finds surprising says
    little. Adds `influence` and `weight`, of mean 1. Rows that cannot be read are left out and counted.

    From the abstract and third-party notes: the paper's map from influence to weight is not known here, and its scores
    anew during training are a pipeline run anew. Validation rows must not be those that results are reported on.
    """

    name: Literal["influence"] = "influence"
    by: str
    """The student, by its name among `writers`: a `local` one."""
    validation: list[Source] = Field(min_length=1)
    """Clean rows, said as sources are: prompts with completions that are right."""
    column: str = "completion"
    """The column whose text is learned from."""
    shape: Literal["softplus", "linear"] = "softplus"
    """The map to weights: `softplus`, positive, or `linear`, cut to 0 and twice the middle."""
    strength: float = Field(1.0, ge=0)
    """Factor on the standardised influence in that map; 0 weighs all alike."""
    damping: float = Field(0.1, gt=0)
    """What is added to H's diagonal, in units of its mean: large, it is gradients' plain inner product."""
    size: int = Field(32, ge=1)
    """Of each side of the projection; gradients have its square of numbers."""

    def asks(self) -> dict[str, str]:
        return {"by": self.by}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "content": [open_source(source).digest(True) for source in self.validation]}

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, "prompt", self.column, by="influence")
        for source in self.validation:
            open_source(source)
        own = ["influence", "weight"]
        return [*(name for name in before if name not in own), *own]

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        clean, _ = read(self.validation, desk.counts)
        lacks(clean.column_names, "prompt", "completion", by="influence.validation")
        writer: Any = desk.writer(self.by)
        if not isinstance(writer, LocalWriter):
            raise ValueError(f"influence.by: {self.by} gives no gradients: a writer `local` does")
        kept, gradients = self._gradients(writer, rows, self.column, desk, "row")
        used, wanted = self._gradients(writer, clean, "completion", desk, "validation row")
        if not used:
            raise ValueError("influence.validation: no row that the student can read")
        if not kept:
            return with_columns(rows.select([]), {"influence": [], "weight": []})
        found = influences(gradients, wanted.mean(0), curvature(gradients, self.damping))
        weights = weights_of_influence(found, self.shape, self.strength)
        desk.counts.figures |= {"validation rows": len(used), "rows that help": int((found < 0).sum())}
        return with_columns(rows.select(kept), {"influence": found.tolist(), "weight": weights.tolist()})

    def _gradients(
        self, writer: LocalWriter, rows: Dataset, column: str, desk: Desk, what: str
    ) -> tuple[list[int], Tensor]:
        """Return the numbers of the rows that can be read, and a gradient of each."""
        pairs = {}
        for number, row in enumerate(rows):
            said: Mapping[str, Any] = row  # pyright: ignore[reportAssignmentType]
            try:
                if not said[column]:
                    raise Unusable(f"no {column}", "it is empty")
                pairs[number] = asked_of(said, "{prompt}", None), said[column]
            except Unusable as why:
                desk.counts.note(f"{what} not read", f"{what} {number}: {why}")
        tokens: dict[int, Tokens] = {}
        for number, pair in pairs.items():
            one = writer.tokens(pair)
            if isinstance(one, Refused):
                desk.counts.note(f"{what} not read", f"{what} {number}: {one.reason}")
            elif not one.border or not one.offsets or len(one.ids) > writer.context:
                why = f"{len(one.ids)} tokens, none that can be learned"
                desk.counts.note(f"{what} not read", f"{what} {number}: {why}")
            else:
                tokens[number] = one
        kept = list(tokens)
        return kept, _of_tokens(writer, [tokens[number] for number in kept], self.size, desk.seed)


def _of_tokens(writer: LocalWriter, tokens: Sequence[Tokens], size: int, seed: int) -> Tensor:
    """Return the gradient of each text, in float64."""
    scorer = writer.scorer()
    sketch, made = None, {}
    for batch in scorer.batches(range(len(tokens)), tokens):
        signal, places = scorer.read([tokens[one] for one in batch])
        if not isinstance(signal, Hidden):
            raise ValueError("influence.by: gradients are those of the head, and its logits are not head(hidden)")
        sketch = sketch or Sketch(signal.vocab_size, signal.hidden.shape[-1], size, seed)
        with torch.no_grad():
            found = sketch.gradients(signal, places.labels, [len(tokens[one].offsets) for one in batch])
        made |= dict(zip(batch, found.cpu().double(), strict=True))
    return torch.stack([made[one] for one in range(len(tokens))]) if made else torch.zeros(0, 1, dtype=torch.float64)
