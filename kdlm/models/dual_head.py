"""An image classifier with a second head: one learns from labels, the other from a teacher."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from kdlm.features import as_vector, recorded, width_of
from kdlm.models.classifiers import Classifier
from kdlm.models.image_classifiers import ImageClassifierSource
from kdlm.section import Section

WEIGHTS, OPTIONS = "dual_head.safetensors", "dual_head.json"
Logits = Float[Tensor, "n classes"]


class DualHead(nn.Module):
    """A classifier f with its own head, and a second one, `scale <f / |f|, W>`, on the feature at a path (DHO).

    Its softmax is `mix softmax(own) + (1 - mix) softmax(second / temperature)`, so it is used like any classifier.

    Args:
        module: an image classifier of transformers.
        feature: path of the module whose output, averaged over places or tokens, the second head sees.
        mix: share of the classifier's own head in the answer.
        temperature: of the second head's part of the answer.
        scale: of the cosine-like products.
    """

    def __init__(self, module: Any, feature: str, *, mix: float, temperature: float, scale: float):
        super().__init__()
        self.module, self.feature = module, feature
        self.mix, self.temperature, self.scale = mix, temperature, scale
        width = width_of(Classifier(module).probed([feature])[feature])
        self.second = nn.Parameter(normalize(torch.randn(Classifier(module).num_classes, width), dim=-1))

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def num_classes(self) -> int:
        """Classes it tells apart."""
        return Classifier(self.module).num_classes

    def heads(self, images: Float[Tensor, "n channels height width"]) -> tuple[Logits, Logits]:
        """Return the logits of the classifier's own head and of the second one."""
        with recorded(self.module, [self.feature]) as features:
            own = self.module(images).logits
        direction = normalize(as_vector(features[self.feature]), dim=-1)
        return own, self.scale * direction @ self.second.T

    def forward(self, images: Float[Tensor, "n channels height width"]) -> Logits:
        """Return the logarithm of the mixed probabilities."""
        own, second = self.heads(images)
        parts = (own.log_softmax(-1), self.mix), ((second / self.temperature).log_softmax(-1), 1 - self.mix)
        return torch.stack([log_q + torch.tensor(share, dtype=log_q.dtype).log() for log_q, share in parts]).logsumexp(
            0
        )

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the classifier as a folder that transformers opens, and the second head beside it."""
        state = self.state_dict() if state_dict is None else state_dict
        inner = {key.removeprefix("module."): value for key, value in state.items() if key.startswith("module.")}
        self.module.save_pretrained(folder, state_dict=inner)
        save_file({"second": state["second"].detach().cpu().contiguous()}, Path(folder) / WEIGHTS)
        kept = {"feature": self.feature, "mix": self.mix, "temperature": self.temperature, "scale": self.scale}
        (Path(folder) / OPTIONS).write_text(json.dumps(kept) + "\n", encoding="utf-8")

    def load_weights(self, folder: Path) -> None:
        """Read back what `save_pretrained` wrote."""
        opened = type(self.module).from_pretrained(folder)
        self.module.load_state_dict(opened.state_dict())
        with torch.no_grad():
            self.second.copy_(load_file(folder / WEIGHTS)["second"])


class DualHeadStudent(Section):
    """An image classifier with a second head for what the teacher says, which `dho` trains."""

    name: Literal["dual_head"] = "dual_head"
    of: ImageClassifierSource
    """The classifier; from a folder that a run with `dual_head` left, its second head comes too."""
    feature: str
    """Path of the module whose output, averaged over places or tokens, the second head sees."""
    mix: float = Field(0.5, ge=0, le=1)
    """Share of the classifier's own head in the answer: to be chosen on held-out labels, after training too."""
    temperature: float = Field(0.5, gt=0)
    """Divides the second head's logits in the answer."""
    scale: float = Field(100.0, gt=0)
    """Factor of the second head's products, CLIP's."""

    def load(self) -> DualHead:
        """Open or make the weights. Raises ValueError when there is no such model, or no such module in it."""
        options = {"mix": self.mix, "temperature": self.temperature, "scale": self.scale}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.of.seed)
            student = DualHead(self.of.load(), self.feature, **options)
        if self.of.path is not None and (Path(self.of.path).expanduser() / WEIGHTS).is_file():
            student.load_weights(Path(self.of.path).expanduser())
        return student

    def describe(self) -> str:
        """Return the name a reader knows this model by."""
        return f"{self.of.describe()} with a second head"
