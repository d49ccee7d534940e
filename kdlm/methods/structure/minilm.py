"""MiniLM: one layer of the student relates the tokens of a text to one another as a layer of the teacher does."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from kdlm.losses import Apart, relation_kl
from kdlm.methods.method import Batch, Nets
from kdlm.methods.structure.inside_method import InsideMethod, of_one_direction
from kdlm.methods.tokens import TokenOptions
from kdlm.models import Ask, Inside, Projections
from kdlm.signal import Rows

Relation = Literal["qk", "qq", "kk", "vv"]


class MiniLM(InsideMethod):
    """Self-attention relations of one layer: v2 (MiniLMv2, arXiv 2012.15828), and v1 (MiniLM, arXiv 2002.10957).

    A relation of x and y is `softmax(x y^T / sqrt(size))`, its loss KL(teacher || student) in the mean over heads and
    tokens; relations are summed. v2 relates queries, keys and values each to themselves, in `relation_heads` heads that
    both widths are cut into, whatever heads the models have. v1 has the attention, `qk`, and `vv`, in the models' own
    heads, which have to be as many. Widths are free. `qk` is the attention of the model itself, rotary
    positions and all; `qq` and `kk` are of queries and keys before they are turned. In causal models a token is related
    to itself and what is before it. Grouped keys and values are cut as they stand side by side; `qk` repeats the keys.

    Args:
        losses: on predictions, added to the relations.
        layers: the student's layer and the teacher's, from 0; negative ones count from the last. The papers have the
            last of both, and of large teachers (24 layers) one above the middle.
        relations: which.
        relation_heads: heads that both sides are cut into; None takes the models' own.
        weight: factor on their sum.
    """

    paper = "arXiv 2002.10957, 2012.15828"
    weighs = True

    def __init__(
        self, losses=(), *, layers=(-1, -1), relations=("qq", "kk", "vv"), relation_heads=None, weight=1.0, **options
    ):
        super().__init__(losses, **options)
        self.layers, self.relations = layers, relations
        self.relation_heads, self.weight = relation_heads, weight

    def asks(self, student: Any, teacher: Any) -> tuple[Ask, Ask]:
        of_one_direction(student, teacher)
        pairs = zip(self.layers, ("student", "teacher"), (student.num_layers, teacher.num_layers), strict=True)
        found = []
        for layer, whose, count in pairs:
            if not -count <= layer < count:
                raise ValueError(f"method.layers: {layer} is out of range: the {whose} has {count} layers")
            found.append(Ask(attention=(layer % count,)))
        return found[0], found[1]

    def compared_inside(
        self, nets: Nets, batch: Batch, rows: Rows, ours: Inside, theirs: Inside
    ) -> dict[str, tuple[Any, float]]:
        apart, causal = Apart.of(batch, rows), nets["student"].causal
        values = {}
        for relation in self.relations:
            student, teacher = (self._sides(apart, one.attention[0], relation) for one in (ours, theirs))
            if student[0].shape[1] != teacher[0].shape[1]:
                raise ValueError(
                    f"method.relations: {relation}: the student has {student[0].shape[1]} heads, the teacher "
                    f"{teacher[0].shape[1]}: set method.relation_heads"
                )
            found = relation_kl(student, teacher, apart.real, causal=causal)
            values[f"relation_{relation}"] = (apart.rows(found), self.weight)
        return values

    def _sides(self, apart: Apart, side: Projections, relation: Relation) -> tuple[Any, Any]:
        """Return x and y of a relation, in heads."""
        parts = {"q": (side.q, side.heads), "k": (side.k, side.kv_heads), "v": (side.v, side.kv_heads)}
        if relation == "qk":
            q, k = side.scored
            parts["q"] = (q, side.heads)
            grouped = k.unflatten(-1, (side.kv_heads, -1))
            repeated = grouped.repeat_interleave(side.heads // side.kv_heads, 1).flatten(1)
            parts["k"] = (repeated, side.heads)
        try:
            x, y = (apart.heads(parts[name][0], self.relation_heads or parts[name][1]) for name in relation)
        except ValueError as error:
            raise ValueError(f"method.relation_heads: {relation}: {error}") from error
        return x, y


class MiniLMSection(TokenOptions):
    """Match how one layer relates the tokens of a text to one another (MiniLM v1, v2); losses on predictions beside."""

    method: ClassVar = MiniLM
    name: Literal["minilm"] = "minilm"
    layers: tuple[int, int] = (-1, -1)
    """[student layer, teacher layer], counted from 0, or from the last one backwards; layers above the teacher's are
    not run where there are no losses."""
    relations: list[Relation] = Field(["qq", "kk", "vv"], min_length=1)
    """v2 as it stands; `[qk, vv]` is v1: attention and the relations of values."""
    relation_heads: int | None = Field(None, ge=1)
    """Heads that both sides are cut into: a divisor of both widths (of queries, and of keys and values). The paper has
    48 for base teachers, 64 for large ones. By default the models' own, which have to be as many (v1)."""
    weight: float = Field(1.0, ge=0)
    """Weight of the relations' sum."""
