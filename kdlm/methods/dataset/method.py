"""DatasetMethod: what all methods that distil a data set share."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from kdlm.diffusion import Draws
from kdlm.methods.dataset.augmentation import Augmentation
from kdlm.methods.dataset.evaluation import Evaluation, answers
from kdlm.methods.dataset.networks import MLP, AnyNetwork, ConvNet, Vectors
from kdlm.methods.method import Batch, Method, Nets, Step, Term, Terms, rows_in
from kdlm.models.synthetic import SyntheticImages
from kdlm.section import Section


class DatasetMethod(Method):
    """A method whose student is a set of images; networks that train on it come and go.

    Args:
        network: the architecture that the set is learned for.
        augmentation: of what networks see, in the method as in evaluation.
        evaluation: how fresh networks train on the set to tell how good it is.
        ema: decay of the average of the set, per step; the average is then what is evaluated and exported.
    """

    needs = frozenset({"images"})
    paced_by = "images"

    def __init__(
        self,
        *,
        network: MLP | ConvNet,
        augmentation: Augmentation,
        evaluation: Evaluation,
        ema: float | None = None,
    ):
        self.network, self.augmentation, self.evaluation, self.ema = network, augmentation, evaluation, ema
        self._known: dict[str, tuple[list[Tensor], Tensor]] = {}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"images": rows_in(batch)}

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give cross-entropy and accuracy of fresh networks that trained on the set, and on the one it began as."""
        images, labels, synthetic = batch["pixel_values"], batch["labels"], synthetic_of(nets, self.exported)
        sets = {"": (self.network, synthetic.pixel_values), "start_": (self.network, synthetic.start)}
        if self.evaluation.second is not None:
            sets["second_"] = (self.evaluation.second, synthetic.pixel_values)
        metrics, loss = {}, torch.zeros((), device=labels.device)
        for name, (architecture, shown) in sets.items():
            networks = Vectors(architecture, tuple(shown.shape[1:]), synthetic.num_classes)
            weights = self.trained(name, architecture, shown, synthetic)
            logits = answers(networks, weights, images)
            metrics[f"{name}accuracy"] = (logits.argmax(-1) == labels).float().mean(0).sum(), "images"
            if not name:
                every = labels.repeat(len(weights))
                loss = cross_entropy(logits.flatten(0, 1), every, reduction="sum") / len(weights)
        return Terms({"cross_entropy": Term(loss, "images")}, metrics)

    def trained(self, name: str, architecture: MLP | ConvNet, shown: Tensor, synthetic: SyntheticImages) -> Tensor:
        """Return networks that trained on images with the set's targets: once, while neither changes."""
        asked = [shown.detach(), synthetic.targets.detach()]
        before, weights = self._known.get(name, ([], None))
        if weights is None or not all(torch.equal(a, b) for a, b in zip(asked, before, strict=True)):
            classes = synthetic.num_classes
            weights = self.evaluation.trained(architecture, *asked, classes, self.augmentation)
            self._known[name] = [each.clone() for each in asked], weights
        return weights


def synthetic_of(nets: Nets, role: str = "student") -> SyntheticImages:
    """Return the set that is learned. Raises ValueError when the student is none."""
    if not isinstance(nets[role], SyntheticImages):
        raise ValueError(
            f"student: {type(nets[role]).__name__} is no set of images to learn; dataset distillation wants "
            "student: {name: synthetic_images, images_per_class: 1}"
        )
    return nets[role]


def seed_of(step: Step, name: str) -> int:
    """Return a seed that belongs to a step, the same on every rank and after a resume."""
    nobody = torch.empty(0, dtype=torch.int64)
    return int(Draws(nobody, step.seed, step.index).shared(name) * 2**53)


def networks_for(section: MLP | ConvNet, synthetic: SyntheticImages) -> Vectors:
    """Return the networks of an architecture that fit a set."""
    return Vectors(section, tuple(synthetic.pixel_values.shape[1:]), synthetic.num_classes)


class DatasetOptions(Section):
    """What can be asked of any method of this room. Every field but `name` goes to the method by its name."""

    method: ClassVar[type[DatasetMethod]]
    """The method that this Section configures."""

    network: AnyNetwork = MLP()
    """Architecture that the set is learned for."""
    augmentation: Augmentation = Augmentation()
    """Of what networks see, in the method as in evaluation."""
    evaluation: Evaluation = Evaluation()
    """How fresh networks train on the set to tell how good it is."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of the average of the set, per step; the average is then what is evaluated and exported."""

    def build(self, losses: Sequence[Any], vocab: Any) -> DatasetMethod:
        """Return the method. Raises ValueError when the recipe has losses."""
        if losses:
            raise ValueError(f"losses: {self.method.__name__} has a loss of its own: leave them out")
        return self.method(**{key: value for key, value in self if key != "name"})
