"""TinyBERT: layers of the student follow mapped layers of the teacher, in attention scores and in hidden states."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from kdlm.losses import Apart, score_mse
from kdlm.losses.distributions import widen
from kdlm.methods.method import Batch, Nets
from kdlm.methods.structure.inside_method import InsideMethod, of_one_direction
from kdlm.methods.tokens import TokenOptions
from kdlm.models import Ask, Inside, Projections
from kdlm.roles import Role, Trainable
from kdlm.signal import Rows


class TinyBERT(InsideMethod):
    """Attention scores, hidden states and embeddings of mapped layers (TinyBERT, arXiv 1909.10351).

    The sum over mapped layers of the squared error of attention scores, mean over heads and keys, and of hidden states
    after a learned linear map, mean over the width; and that of embeddings, after a map of their own. Scores are those
    of the model itself, rotary positions and all. Hidden states and embeddings are first divided by their root mean
    square, each token by its own: what leaves a layer of BERT has been normalised, and what leaves one that normalises
    only what it reads (Llama, EuroBERT) may be of any size, unlike from token to token. Every layer has a map of its
    own; it begins as the identity where the widths are equal. The maps are a role: trained, checkpointed and never
    exported. `hidden_kd` looks at predicted places of causal models alone, this at all tokens.

    Args:
        losses: on predictions, added to the rest.
        layers: (student layer, teacher layer) pairs, from 0; None maps every layer of the student evenly onto the
            teacher's depth: `g(m) = m L_t / L_s`, in the paper's count from 1.
        attention, hidden, embeddings: factor on each part; 0 leaves it out. The paper has 1 for all: scores are no
            probabilities, and their squares were ten times the other terms here.
        projector_learning_rate: the maps' own rate; None follows the run.
    """

    paper = "arXiv 1909.10351"
    weighs = True

    def __init__(
        self, losses=(), *, layers=None, attention=0.1, hidden=1.0, embeddings=1.0, projector_learning_rate=None,
        **options,
    ):  # fmt: skip
        super().__init__(losses, **options)
        self.layers: Sequence[tuple[int, int]] | None = layers
        self.attention, self.hidden, self.embeddings = attention, hidden, embeddings
        self.projector_learning_rate = projector_learning_rate

    @property
    def roles(self) -> dict[str, Role]:
        if not self.hidden and not self.embeddings:
            return {"student": Trainable()}
        return {"student": Trainable(), "projectors": Trainable(self._projectors, self.projector_learning_rate)}

    def asks(self, student: Any, teacher: Any) -> tuple[Ask, Ask]:
        of_one_direction(student, teacher)
        sides = zip(*self.mapped(student, teacher), strict=True)
        ours, theirs = (
            Ask(layers if self.hidden else (), layers if self.attention else (), self.embeddings > 0)
            for layers in sides
        )
        return ours, theirs

    def compared_inside(
        self, nets: Nets, batch: Batch, rows: Rows, ours: Inside, theirs: Inside
    ) -> dict[str, tuple[Tensor, float]]:
        values: dict[str, tuple[Tensor, float]] = {}
        if self.hidden:
            pairs = zip(nets["projectors"]["hidden"], ours.hidden, theirs.hidden, strict=True)
            values["hidden"] = (sum(_error(*one) for one in pairs), self.hidden)  # pyright: ignore[reportArgumentType]
        if self.embeddings:
            error = _error(nets["projectors"]["embeddings"][0], ours.embeddings, theirs.embeddings)
            values["embeddings"] = (error, self.embeddings)
        if self.attention:
            apart, causal = Apart.of(batch, rows), nets["student"].causal
            layers = zip(ours.attention, theirs.attention, strict=True)
            scores = [score_mse(*_heads(apart, *pair), apart.real, causal=causal) for pair in layers]
            values["attention"] = (apart.rows(sum(scores)), self.attention)  # pyright: ignore[reportArgumentType]
        return values

    def mapped(self, student: Any, teacher: Any) -> Sequence[tuple[int, int]]:
        """Return the pairs of layers. Raises ValueError where one is out of range."""
        if self.layers is None:
            ours, theirs = student.num_layers, teacher.num_layers
            self.layers = [(m, -(-(m + 1) * theirs // ours) - 1) for m in range(ours)]
        for ours, theirs in self.layers:
            if not (0 <= ours < student.num_layers and 0 <= theirs < teacher.num_layers):
                raise ValueError(
                    f"method.layers: [{ours}, {theirs}] is out of range: the student has {student.num_layers} layers, "
                    f"the teacher {teacher.num_layers}"
                )
        return self.layers

    def _projectors(self, student: Any, teacher: Any) -> nn.ModuleDict:
        sizes = student.hidden_size, teacher.hidden_size
        count = len(self.mapped(student, teacher))
        maps = {"hidden": count if self.hidden else 0, "embeddings": 1 if self.embeddings else 0}
        return nn.ModuleDict({name: nn.ModuleList(_map(*sizes) for _ in range(n)) for name, n in maps.items() if n})


def _map(ours: int, theirs: int) -> nn.Linear:
    made = nn.Linear(ours, theirs, bias=False)
    if ours == theirs:
        nn.init.eye_(made.weight)
    return made


def _error(projector: Any, student: Any, teacher: Any) -> Tensor:
    found = widen(projector(_unit(widen(student)).to(projector.weight.dtype)))  # fp32 maps; autocast maps in bf16
    return (found - _unit(teacher.to(found.dtype))).square().mean(-1)


def _unit(states: Tensor) -> Tensor:
    return rms_norm(states, states.shape[-1:], eps=1e-5)


def _heads(apart: Apart, *sides: Projections) -> list[tuple[Tensor, Tensor]]:
    """Return queries and keys of student and teacher, grouped keys repeated. Raises ValueError for unequal heads."""
    if sides[0].heads != sides[1].heads:
        raise ValueError(
            f"method.attention: the student has {sides[0].heads} heads, the teacher {sides[1].heads}: scores are "
            "compared head by head; take a student with as many, or set method.attention: 0"
        )
    return [
        (
            apart.heads(one.scored[0], one.heads),
            apart.heads(one.scored[1], one.kv_heads).repeat_interleave(one.heads // one.kv_heads, 1),
        )
        for one in sides
    ]


class TinyBERTSection(TokenOptions):
    """Match attention scores, hidden states, embeddings of mapped layers (TinyBERT); losses on predictions beside."""

    method: ClassVar = TinyBERT
    name: Literal["tinybert"] = "tinybert"
    layers: list[tuple[int, int]] | None = Field(None, min_length=1)
    """[student layer, teacher layer] pairs, counted from 0; by default all of the student's, evenly."""
    attention: float = Field(0.1, ge=0)
    """Weight of attention scores, which are no probabilities and may be large; 0 for a student with another number of
    heads."""
    hidden: float = Field(1.0, ge=0)
    """Weight of hidden states of one size, through a learned map for each layer."""
    embeddings: float = Field(1.0, ge=0)
    """Weight of what the first layer reads, through a map of its own."""
    projector_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the maps; by default the run's."""

    @model_validator(mode="after")
    def _compares_something(self) -> "TinyBERTSection":
        if not self.attention + self.hidden + self.embeddings:
            raise ValueError(
                "attention, hidden and embeddings are all 0: nothing is compared; use logit_kd or the like"
            )
        return self
