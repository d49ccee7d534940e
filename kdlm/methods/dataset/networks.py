"""Small networks that train on a synthetic set, with their parameters as one vector."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from kdlm.section import Section


class Network(nn.Module):
    """A classifier in two parts: features of an image, and a linear head."""

    def __init__(self, features: nn.Sequential, width: int, classes: int):
        super().__init__()
        self.features, self.head = features, nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class MLP(Section):
    """Linear layers with ReLU between them."""

    name: Literal["mlp"] = "mlp"
    width: int = Field(64, ge=1)
    """Of the hidden layers."""
    depth: int = Field(1, ge=1)
    """Hidden layers."""

    def build(self, shape: tuple[int, ...], classes: int) -> Network:
        """Return the network, from torch's global generator, for images of a shape."""
        layers: list[nn.Module] = [nn.Flatten()]
        for number in range(self.depth):
            layers += [nn.Linear(self.width if number else torch.Size(shape).numel(), self.width), nn.ReLU()]
        return Network(nn.Sequential(*layers), self.width, classes)


class ConvNet(Section):
    """Blocks of a 3 x 3 convolution, instance norm, ReLU and average pooling, the usual network of the field."""

    name: Literal["convnet"] = "convnet"
    width: int = Field(32, ge=1)
    """Channels of each block."""
    depth: int = Field(2, ge=1)
    """Blocks; each halves the side of the image."""

    def build(self, shape: tuple[int, ...], classes: int) -> Network:
        """Return the network, from torch's global generator. Raises ValueError for images too small for its depth."""
        channels, height, width = shape
        if min(height, width) >> self.depth < 1:
            raise ValueError(f"network.depth: {self.depth} halvings of images of {height} x {width} leave nothing")
        layers: list[nn.Module] = []
        for number in range(self.depth):
            before = self.width if number else channels
            convolution = nn.Conv2d(before, self.width, 3, padding=1)
            layers += [convolution, nn.GroupNorm(self.width, self.width), nn.ReLU(), nn.AvgPool2d(2)]
        left = self.width * (height >> self.depth) * (width >> self.depth)
        return Network(nn.Sequential(*layers, nn.Flatten()), left, classes)


AnyNetwork = Annotated[MLP | ConvNet, Field(discriminator="name")]


class Vectors:
    """Networks of one architecture, each given as the vector of all its parameters.

    Args:
        section: the architecture.
        shape: of an image.
        classes: to tell apart.
    """

    def __init__(self, section: MLP | ConvNet, shape: tuple[int, ...], classes: int):
        self.section, self.shape, self.classes = section, shape, classes
        with torch.device("meta"):  # its layers' work, without weights of its own
            self.module = section.build(shape, classes)
        self.shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}

    def fresh(self, seed: int, device: torch.device | None = None) -> Float[Tensor, "size"]:
        """Return a new network, as its layers begin by default. torch's own generator stays where it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.section.build(self.shape, self.classes)
        return nn.utils.parameters_to_vector(module.parameters()).detach().to(device)

    def logits(self, vector: Float[Tensor, "size"], images: Tensor) -> Float[Tensor, "n classes"]:
        """Return a network's logits, in the graph of its vector and of the images."""
        return functional_call(self.module, self._named(vector), (images,))

    def features(self, vector: Float[Tensor, "size"], images: Tensor) -> Float[Tensor, "n width"]:
        """Return what a network's head would get."""
        named = {name.removeprefix("features."): value for name, value in self._named(vector).items()}
        parts = {name: value for name, value in named.items() if not name.startswith("head.")}
        return functional_call(self.module.features, parts, (images,))

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
