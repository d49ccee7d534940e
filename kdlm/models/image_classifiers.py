"""Where an image classifier comes from: a hub id or folder, the sandbox, or a configuration with random weights."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from kdlm.models.configured import Configured
from kdlm.models.loading import open_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ImageClassifierSource(Configured):
    """A model of transformers that tells images apart; a `timm/...` hub id is one too, where timm is installed."""

    kind: ClassVar = "AutoModelForImageClassification"
    sandbox: ClassVar = ("digits-vit", "digits-resnet")

    name: Literal["image_classifier"] = "image_classifier"
    path: str | None = None
    """Hub id, folder, `sandbox:digits-vit` or `sandbox:digits-resnet`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    config: dict[str, Any] | None = None
    """In place of `path`, random weights: `model_type` (`vit`, `resnet`, `convnextv2`, ..., or kdlm's `mlp`) and the
    values of that configuration, e.g. {model_type: mlp, hidden_sizes: [8, 8], num_labels: 10}."""
    num_labels: int | None = Field(None, ge=2)
    """Put a fresh head of so many classes on the weights of `path`, in place of one of another size."""

    @model_validator(mode="after")
    def _whole_configuration(self) -> "ImageClassifierSource":
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config.model_type: missing; e.g. {model_type: vit, image_size: 32, num_labels: 10}")
        if self.config is not None and self.num_labels is not None:
            raise ValueError("num_labels: of random weights, say it in config")
        return self

    def load(self) -> "PreTrainedModel":
        """Open or make the weights. Raises ValueError naming the path when there is no such model."""
        from transformers import AutoModelForImageClassification

        import kdlm.models.mlp  # noqa: F401  makes it known to transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.path is None:
                dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
                return AutoModelForImageClassification.from_config(self.configuration(), dtype=dtype)
            options = {"dtype": self.dtype, "ignore_mismatched_sizes": self.num_labels is not None}
            return open_pretrained(AutoModelForImageClassification, self.location(), **options, **self._of_hub())

    def configuration(self) -> Any:
        """Return the configuration: sizes, without weights. Raises ValueError for a value that it does not have."""
        from transformers import AutoConfig

        import kdlm.models.mlp  # noqa: F401  makes it known to transformers

        if self.config is None:
            return open_pretrained(AutoConfig, self.location(), **self._of_hub())
        given, kind = (
            {key: value for key, value in self.config.items() if key != "model_type"},
            self.config["model_type"],
        )
        try:
            known = AutoConfig.for_model(kind)
        except ValueError as error:
            raise ValueError(f"config.model_type: transformers has no {kind!r}") from error
        return AutoConfig.for_model(kind, **self._known_to(known, given))

    def _of_hub(self) -> dict[str, Any]:
        """Return what weights and configuration of a path are opened with."""
        return {"revision": self.revision} | ({} if self.num_labels is None else {"num_labels": self.num_labels})

    def skeleton(self) -> "PreTrainedModel":
        """Return the model without weights: its modules and their names."""
        from transformers import AutoModelForImageClassification

        with torch.device("meta"):
            return AutoModelForImageClassification.from_config(self.configuration())

    def describe(self) -> str:
        """Return the name a reader knows this model by."""
        if self.config is not None:
            return f"{self.config['model_type']} with random weights"
        return f"{self.path}" if self.revision is None else f"{self.path}@{self.revision}"


class ImageClassifierStudent(ImageClassifierSource):
    """An image classifier to train."""
