"""A multilayer perceptron on the pixels of small images, as a model of transformers."""

from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class MLPConfig(PreTrainedConfig):
    """Sizes of the perceptron: of the square image, its channels, and the hidden layers."""

    model_type = "mlp"

    def __init__(self, image_size: int = 8, num_channels: int = 1, hidden_sizes: Any = (64,), **options: Any):
        self.image_size, self.num_channels, self.hidden_sizes = image_size, num_channels, list(hidden_sizes)
        super().__init__(**options)


class MLPForImageClassification(PreTrainedModel):
    """Linear layers with ReLU between them; `layers.0`, `layers.1`, ... give the hidden features."""

    config_class = MLPConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MLPConfig):
        super().__init__(config)
        pixels = config.num_channels * config.image_size**2
        widths = [pixels, *config.hidden_sizes]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths))
        classes: Any = config.num_labels
        self.classifier = nn.Linear(widths[-1], classes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()  # torch's own: a normal of 0.02 hardly lets so few layers begin

    def forward(self, pixel_values: Float[Tensor, "n channels size size"], **unused: Any) -> ImageClassifierOutput:
        hidden = pixel_values.flatten(1)
        for layer in self.layers:
            hidden = layer(hidden)
        return ImageClassifierOutput(logits=self.classifier(hidden))


AutoConfig.register("mlp", MLPConfig, exist_ok=True)
AutoModelForImageClassification.register(MLPConfig, MLPForImageClassification, exist_ok=True)
