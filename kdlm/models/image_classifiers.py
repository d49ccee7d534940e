"""Where an image classifier comes from: a hub id or folder, the sandbox, or a configuration with random weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from pydantic import Field, model_validator

from kdlm.models.loading import open_pretrained
from kdlm.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SandboxClassifier = Literal["digits-vit", "digits-resnet"]


class ImageClassifierSource(Section):
    """A model of transformers that tells images apart; a `timm/...` hub id is one too, where timm is installed."""

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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights; `auto` takes the checkpoint's own."""
    seed: int = 0
    """Seed of random weights."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ImageClassifierSource":
        if (self.path is None) == (self.config is None):
            raise ValueError("say either path (a checkpoint) or config (random weights)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config.model_type: missing; e.g. {model_type: vit, image_size: 32, num_labels: 10}")
        if self.config is not None and self.num_labels is not None:
            raise ValueError("num_labels: of random weights, say it in config")
        return self

    @property
    def on_this_machine(self) -> bool:
        """Whether its configuration can be read without a network and without building anything."""
        from kdlm.sandbox import is_built

        if self.path is None:
            return True
        name = self.path.removeprefix("sandbox:")
        return is_built(self._known(name)) if name != self.path else Path(self.path).expanduser().is_dir()

    def load(self) -> "PreTrainedModel":
        """Open or make the weights. Raises ValueError naming the path when there is no such model."""
        from transformers import AutoModelForImageClassification

        import kdlm.models.mlp  # noqa: F401  makes it known to transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.path is None:
                dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
                return AutoModelForImageClassification.from_config(self.configuration(), dtype=dtype)
            fresh = {} if self.num_labels is None else {"num_labels": self.num_labels}
            options = {"revision": self.revision, "dtype": self.dtype, "ignore_mismatched_sizes": bool(fresh)}
            return open_pretrained(AutoModelForImageClassification, self.location(), **options, **fresh)

    def configuration(self) -> Any:
        """Return the configuration: sizes, without weights."""
        from transformers import AutoConfig

        import kdlm.models.mlp  # noqa: F401  makes it known to transformers

        if self.config is None:
            fresh = {} if self.num_labels is None else {"num_labels": self.num_labels}
            return open_pretrained(AutoConfig, self.location(), revision=self.revision, **fresh)
        given = {key: value for key, value in self.config.items() if key != "model_type"}
        try:
            known = AutoConfig.for_model(self.config["model_type"])
        except ValueError as error:
            kind = self.config["model_type"]
            raise ValueError(f"config.model_type: transformers has no {kind!r}") from error
        if unknown := [key for key in given if not hasattr(known, key)]:
            raise ValueError(f"config: {type(known).__name__} has no {', '.join(unknown)}")
        return AutoConfig.for_model(self.config["model_type"], **given)

    def location(self) -> str:
        """Return the hub id or folder. Builds a sandbox model that is missing: seconds."""
        from kdlm.sandbox import build

        assert self.path is not None
        name = self.path.removeprefix("sandbox:")
        return self.path if name == self.path else str(build(self._known(name)))

    def _known(self, name: str) -> str:
        if name not in get_args(SandboxClassifier):
            raise ValueError(
                f"the sandbox has no classifier {name!r}. One of: {', '.join(get_args(SandboxClassifier))}"
            )
        return name

    def describe(self) -> str:
        """Return the name a reader knows this model by."""
        if self.config is not None:
            return f"{self.config['model_type']} with random weights"
        return f"{self.path}" if self.revision is None else f"{self.path}@{self.revision}"


class ImageClassifierStudent(ImageClassifierSource):
    """An image classifier to train."""
