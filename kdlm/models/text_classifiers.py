"""Classifiers of texts: an encoder (BERT and its kin) or decoder with a head of classes, and how methods read one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.models.classifiers import Classifier
from kdlm.models.inside import Ask, Inside, recording, shortened
from kdlm.models.loading import open_pretrained
from kdlm.models.masked_language_models import MaskedLanguageModel
from kdlm.models.prediction import TextReader, backbone, inputs_of
from kdlm.signal import Dense, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TextClassifier(TextReader, Classifier):
    """Asks a classifier of texts for its logits, or for what is inside it, as a `Predictor` is asked."""

    provides = frozenset({"teacher.classes", "teacher.layers"})
    tells_classes = True
    """It predicts the class of a text, and no token."""
    mask_id = None

    def __init__(self, module: Any):
        super().__init__(module)
        self.inputs = inputs_of(module)

    def with_features(
        self, images: dict[str, Tensor], paths: Sequence[str]
    ) -> tuple[Float[Tensor, "batch classes"], dict[str, Any]]:
        """Return the logits of a batch of texts: `input_ids` and what the model reads beside; it has no features."""
        inputs = {key: images[key] for key in images if key in self.inputs}
        return self.module(**inputs).logits, {}

    def inside(
        self, batch: dict[str, Tensor], rows: Rows, ask: Ask, predicted: Rows | None = None
    ) -> tuple[Dense | None, Inside]:
        """Return the logits of all texts, and what is asked of the model's inside at `rows`.

        Where `predicted` is None there are no logits, and layers above the highest one that is asked are not run.
        """
        body, inputs = backbone(self.module), {key: batch[key] for key in batch if key in self.inputs}
        with recording(body, ask) as recorded:
            if predicted is not None:
                signal = Dense(self.module(**inputs).logits)
            else:
                signal = None
                with shortened(body, ask.depth):
                    body(**inputs)
        return signal, recorded.at(rows)


class TextClassifierSource(MaskedLanguageModel):
    """A classifier of texts: what transformers' `AutoModelForSequenceClassification` opens.

    Weights that the checkpoint lacks, as the head of a language model's, are random.
    """

    name: Literal["text_classifier"] = "text_classifier"  # pyright: ignore[reportIncompatibleVariableOverride]
    num_labels: int | None = Field(None, ge=2)
    """Put a fresh head of so many classes on the model, in place of one of another size."""
    sizes: dict[str, Any] = {}
    """Take only the configuration and tokenizer of `path`, with these values changed, and random weights: e.g.
    {num_hidden_layers: 4, hidden_size: 312, intermediate_size: 1200}."""
    seed: int = 0
    """Seed of random weights."""

    def load(self, **extra: Any) -> "PreTrainedModel":
        """Open or make the weights. Raises ValueError naming the path when there is no such model."""
        from transformers import AutoModelForSequenceClassification

        classes = {} if self.num_labels is None else {"num_labels": self.num_labels}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.sizes:
                dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
                return self._padded(AutoModelForSequenceClassification.from_config(self.config(), dtype=dtype))
            options = {"revision": self.revision, "ignore_mismatched_sizes": bool(classes), **classes}
            return self._padded(
                open_pretrained(
                    AutoModelForSequenceClassification, self.location(), **options, **self.options(), **extra
                )
            )

    def _padded(self, model: Any) -> "PreTrainedModel":
        """Tell a decoder, which judges a text by its last token, what batches are padded with."""
        if hasattr(model, "score"):
            tokenizer = self.tokenizer()
            pad = getattr(tokenizer, "pad_token_id", None)
            model.config.get_text_config().pad_token_id = getattr(tokenizer, "eos_token_id", 0) if pad is None else pad
        return model

    def config(self) -> Any:
        """Return the configuration: sizes, without weights. Raises ValueError for a value that it does not have."""
        config = super().config()
        if unknown := [key for key in self.sizes if not hasattr(config, key)]:
            raise ValueError(f"sizes: {type(config).__name__} has no {', '.join(unknown)}")
        for key, value in self.sizes.items():
            setattr(config, key, value)
        if (types := getattr(config, "layer_types", None)) is not None:
            config.layer_types = (types * config.num_hidden_layers)[: config.num_hidden_layers]
        if self.num_labels is not None and config.num_labels != self.num_labels:
            config.num_labels = self.num_labels
        return config


class TextClassifierStudent(TextClassifierSource):
    """A classifier of texts to train."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Data type of the trained weights; float32 with `training.bf16` is the safe pair. `auto`: the checkpoint's own."""
