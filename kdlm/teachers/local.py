"""A frozen model on this machine as the teacher."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from kdlm.checkpoints import fingerprint_of
from kdlm.deepspeed import shape_of
from kdlm.models import (
    Ask,
    Inside,
    MaskedLanguageModel,
    Predictor,
    Pretrained,
    Sandbox,
    Sliced,
    VisionLanguage,
    tensor_parallel,
)
from kdlm.section import Section
from kdlm.sharding import gathered, sharded
from kdlm.signal import Dense, Head, Hidden, Rows
from kdlm.teachers.placement import own_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LocalTeacher:
    """Answers a batch with the frozen model's hidden states and head (exact over the whole vocabulary).

    Stays off the trainer's module tree: never wrapped by DDP, never saved, never in training mode, no graph.

    Args:
        model: a language model; put in eval mode and frozen here. A masked one fills in what a batch hides, and so
            provides `teacher.unmasking` in place of `teacher`.
        signal: `hidden` keeps logits out of memory; `dense` runs the head on all rows; `auto` is `hidden` where the
            model's logits are `head(hidden)`, else `dense`.
        computes_on: where a model in shards computes (see `kdlm.sharding`): every rank must ask such a teacher at the
            same time, each for its own batch, and its head is gathered once for each answer.
    """

    provides = frozenset({"teacher", "teacher.layers"})
    tells_classes = False

    def __init__(
        self,
        model: "PreTrainedModel",
        signal: Literal["auto", "hidden", "dense"] = "auto",
        computes_on: torch.device | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.computes_on = computes_on
        self._predict = Predictor(self.model, reads_hidden=None if computes_on is None else True)
        if self._predict.mask_id is not None:
            self.provides = MaskedTeacherSection.provides
        if signal == "hidden" and not self._predict.reads_hidden:
            raise ValueError(
                "teacher.signal: hidden cannot be had: this model's logits are not head(hidden); use dense"
            )
        self._dense = signal == "dense"
        self._head: Head | None = None

    @property
    def signals(self) -> frozenset[type]:
        """The kinds of signal this teacher answers with."""
        return frozenset({Dense if self._dense or not self._predict.reads_hidden else Hidden})

    @property
    def hidden_size(self) -> int:
        return self._predict.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device if self.computes_on is None else self.computes_on

    def fingerprint(self) -> str:
        """Return what tells its weights from others. Raises ValueError where no rank has them whole."""
        if self.in_shards:
            raise ValueError("teacher.placement: a sharded teacher has no fingerprint: use resident")
        return fingerprint_of(self.model)

    @property
    def vocab_size(self) -> int:
        """The number of ids it scores: the rows of its head, padding among them."""
        return shape_of(self.model.get_output_embeddings().weight)[0]  # pyright: ignore[reportOptionalMemberAccess]

    @property
    def num_layers(self) -> int:
        return self._predict.num_layers

    def __call__(self, batch: dict[str, Tensor], rows: Rows) -> Hidden | Dense:
        """Return the teacher's signal at the kept rows, on the batch's device."""
        return self.with_layers(batch, rows, ())[0]

    @torch.no_grad()
    def with_layers(
        self, batch: dict[str, Tensor], rows: Rows, layers: Sequence[int]
    ) -> tuple[Hidden | Dense, list[Tensor]]:
        """Return the signal and the outputs of decoder layers `layers` at the kept rows."""
        signal, inside = self.inside(batch, rows, Ask(layers=layers), rows)
        assert signal is not None
        return signal, inside.hidden

    @torch.no_grad()
    def inside(
        self, batch: dict[str, Tensor], rows: Rows, ask: Ask, predicted: Rows | None = None
    ) -> tuple[Hidden | Dense | None, Inside]:
        """Return the signal at the rows `predicted` and what is asked of the inside at `rows`, as `Predictor.inside`.

        The layers above the highest one that is asked are not run where no signal is wanted.
        """
        if "theirs" in batch:
            check_length(batch, self.model)
            theirs, rows = own_reading(batch, rows)
            predicted = None if predicted is None else own_reading(batch, predicted)[1]
            batch = theirs
        home, away = rows.index.device, self.device
        there = {key: value.to(away) for key, value in batch.items()}
        wanted = None if predicted is None else _moved(predicted, away)
        signal, inside = self._predict.inside(there, _moved(rows, away), ask, wanted)
        if isinstance(signal, Hidden):
            signal = Hidden(signal.hidden.to(home), self._head_on(home, self._whole(signal.head)))
            if self._dense:
                signal = Dense(signal.head.logits(signal.hidden))
        elif signal is not None:
            signal = Dense(signal.logits.to(home))
        return signal, inside.each(lambda one: one.to(home))

    @property
    def causal(self) -> bool:
        """Whether a token sees only what is before it."""
        return self._predict.causal

    @torch.no_grad()
    def embed(self, ids: Int[Tensor, "rows"]) -> Float[Tensor, "rows width"]:
        """Return the teacher's input embeddings of these tokens, on their device."""
        return self._predict.embed(ids.to(self.device)).to(ids.device)

    @property
    def in_shards(self) -> bool:
        """Whether all ranks must ask it at the same time."""
        return self.computes_on is not None or tensor_parallel(self.model) > 0

    @property
    def moves(self) -> bool:
        """Whether it can change its device: not where it was quantised, spread or sharded while loading."""
        placed = getattr(self.model, "hf_device_map", None) is not None or self.computes_on is not None
        return not placed and not getattr(self.model, "is_quantized", False)

    def to(self, device: torch.device) -> "LocalTeacher":
        """Move the model, unless it was quantised, spread or sharded while loading."""
        if self.moves:
            self.model.to(device)  # pyright: ignore[reportArgumentType]  transformers' decorator hides the signature
        return self

    def _whole(self, head: Head) -> Head:
        """Return the head with all of its weights on this rank."""
        return head if self.computes_on is None else gathered(head)

    def _head_on(self, device: torch.device, head: Head) -> Head:
        """Return the head on the student's device; a teacher that lives elsewhere keeps one copy of it there."""
        if head.weight.device == device:
            return head
        if self._head is None:
            self._head = head.to(device)
        return self._head


def _moved(rows: Rows, device: torch.device) -> Rows:
    return Rows(rows.index.to(device), rows.labels.to(device))


def own_reading(batch: dict[str, Any], rows: Rows) -> tuple[dict[str, Tensor], Rows]:
    """Return the teacher's own batch of the same text and images, and where the rows are in it.

    Raises ValueError for rows at tokens of an image that the teacher has not: it makes more or fewer of the image.
    """
    theirs = batch["theirs"]
    index = theirs["at"].flatten().index_select(0, rows.index)
    if (index < 0).any():
        ours, own = (int((one["visual"] == 0).sum()) for one in (batch, theirs))
        raise ValueError(
            f"the student reads an image as {ours} tokens, the teacher as {own}: they cannot be compared at images; "
            "set method.visual: 0 and method.relation: 0, or take a pair with equal patches"
        )
    return theirs, Rows(index, rows.labels)


def check_length(batch: dict[str, Any], model: Any) -> None:
    """Raise ValueError where what a teacher is told makes its text longer than its model can read."""
    if "informed" not in batch:
        return
    theirs, most = batch["theirs"], getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None or theirs["input_ids"].shape[1] <= most:
        return
    sizes = theirs["attention_mask"].sum(1) if "attention_mask" in theirs else theirs["position_ids"] + 1
    if (longest := int(sizes.max())) > most:
        raise ValueError(
            f"data.context: the teacher is told so much that it would read {longest} tokens, and its model reads "
            f"{most}: lower context.max_tokens, data.max_length or rollouts.sampling.max_new_tokens"
        )


class LocalOptions(Section):
    """What can be asked of any teacher that is a local model."""

    provides: ClassVar[frozenset[str]] = LocalTeacher.provides
    """What a method may need of it, known without loading the weights."""
    signals: ClassVar[frozenset[type]] = frozenset({Hidden, Dense})
    """The signals it may answer with; which one depends on the model and on `signal`."""

    device: str | None = None
    """Where the teacher lives: `cuda:1`, `cpu`, or `auto` to spread it; by default beside the student. With several
    ranks, `next`: rank r of n takes GPU n + r."""
    signal: Literal["auto", "hidden", "dense"] = Field("auto")
    """`hidden` keeps teacher logits out of memory, `dense` computes them all, `auto` takes hidden where it is exact."""
    placement: Literal["resident", "sliced", "sharded", "auto"] = "resident"
    """`resident`: beside the student, whole on every rank. `sliced`: in the host's memory, and on the student's device
    only while it answers all micro-batches of an optimiser step. `sharded`: each rank holds its share of every weight,
    and a layer is gathered while it computes. `auto`: what `kdlm plan` foresees to fit, the fastest first."""
    offload: bool = False
    """With `sharded`: the shards stay in the host's memory. On a CPU that is where they are anyway."""
    batch_size: int | None = Field(None, ge=1)
    """Sequences that the teacher reads at once, whatever the student's micro-batch is: fewer, or those of several."""

    @model_validator(mode="after")
    def _fits_its_placement(self) -> "LocalOptions":
        if self.offload and self.placement != "sharded":
            raise ValueError("offload is of shards: say placement: sharded")
        if self.placement != "resident" and self.device is not None:
            raise ValueError(f"placement: {self.placement} uses the student's device: leave device out")
        if self.placement in ("sliced", "sharded") and getattr(self, "quantization", "none") != "none":
            raise ValueError(
                f"placement: {self.placement} moves plain weights: leave quantization out, or say resident"
            )
        if getattr(self, "tensor_parallel", False) and (self.placement != "resident" or self.device is not None):
            raise ValueError("tensor_parallel: slices stay where they are: leave placement and device out")
        return self


def _build(
    section: "LocalTeacherSection | SandboxTeacherSection | VisionLanguageTeacherSection | MaskedTeacherSection",
    device: torch.device,
) -> LocalTeacher:
    from kdlm.teachers.ahead import AheadTeacher  # which is a LocalTeacher

    if section.placement == "auto":
        raise ValueError(
            "teacher.placement: auto is settled before a run: `kdlm train` does so, and kdlm.plan.settled(recipe)"
        )
    own: dict[str, Any] = {"sliced": section.placement == "sliced", "batch_size": section.batch_size}
    kind = partial(AheadTeacher, **own) if any(own.values()) else LocalTeacher
    if section.placement == "sharded":
        return kind(sharded(section.load, device, offload=section.offload), section.signal, computes_on=device)
    placed: dict[str, Any] = {} if section.device is None else {"device_map": own_device(section.device)}
    if section.quantization != "none" and not placed:
        placed = {"device_map": {"": str(device)}}
    teacher = kind(section.load(**placed), section.signal)
    return teacher if placed else teacher.to(device)


class LocalTeacherSection(Sliced, Pretrained, LocalOptions):
    """A frozen model from a hub id or a local folder."""

    name: Literal["local"] = "local"  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, device: torch.device) -> LocalTeacher:
        """Load the model and freeze it; `device` is where the student trains."""
        return _build(self, device)


class SandboxTeacherSection(Sliced, Sandbox, LocalOptions):
    """A frozen model that kdlm builds on this machine."""

    def build(self, device: torch.device) -> LocalTeacher:
        """Load the model, built at its first use, and freeze it; `device` is where the student trains."""
        return _build(self, device)


class VisionLanguageTeacherSection(VisionLanguage, LocalOptions):
    """A frozen model that reads images and text."""

    def build(self, device: torch.device) -> LocalTeacher:
        """Load the model and freeze it; `device` is where the student trains."""
        return _build(self, device)


class MaskedTeacherSection(MaskedLanguageModel, LocalOptions):
    """A frozen masked language model, for a student that is one."""

    provides: ClassVar[frozenset[str]] = frozenset({"teacher.unmasking", "teacher.layers"})
    """What a method may need of it, known without loading the weights."""

    def build(self, device: torch.device) -> LocalTeacher:
        """Load the model and freeze it; `device` is where the student trains."""
        return _build(self, device)
