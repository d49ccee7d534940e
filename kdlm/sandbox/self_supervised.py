"""Teachers of the digits that know no classes: CLIP of images and captions, and a masked autoencoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlm.sandbox.language_models import torch_release
from kdlm.sandbox.progress import Progress

IMAGES = {"image_size": 8, "patch_size": 2, "num_channels": 1}
BATCH = 128


@dataclass(frozen=True)
class DualEncoderModel:
    """A CLIPModel of transformers, trained by CLIP's own loss on the digits and their captions.

    Attributes:
        vision, text: sizes of the two towers' configurations.
        embedding: width of what images and texts have in common.
    """

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    embedding: int
    steps: int
    learning_rate: float
    seed: int = 0

    needs = ()

    def ingredients(self) -> dict[str, Any]:
        sizes = {"vision": dict(self.vision), "text": dict(self.text), "embedding": self.embedding}
        rest = {"steps": self.steps, "learning_rate": self.learning_rate, "seed": self.seed}
        return {**sizes, **rest, "torch": torch_release()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        import torch
        from transformers import CLIPConfig, CLIPModel

        from kdlm.sandbox.captions import LENGTH, WORDS, caption_ids, caption_tokenizer
        from kdlm.sandbox.digits import digits

        train, test = digits()
        ids = caption_ids()
        words = {"vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "eos_token_id": 1, "pad_token_id": 0}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            config = CLIPConfig(
                vision_config={**IMAGES, **self.vision, "projection_dim": self.embedding},
                text_config={**words, "bos_token_id": 1, **self.text, "projection_dim": self.embedding},
                projection_dim=self.embedding,
            )
            model = CLIPModel(config)

            def contrast(chosen: Any) -> Any:
                texts = ids[train.labels[chosen], torch.randint(ids.shape[1], chosen.shape)]
                asked = {"input_ids": texts, "attention_mask": (texts != 0).long()}
                scores = model(**asked, pixel_values=train.images[chosen] * 2 - 1).logits_per_image
                own, cross = torch.arange(len(chosen)), torch.nn.functional.cross_entropy
                return cross(scores, own) + cross(scores.T, own)

            _fit(model, contrast, len(train.labels), self, progress, name, weight_decay=0.05)
            with torch.no_grad():
                asked = {"input_ids": ids[:, 0], "attention_mask": (ids[:, 0] != 0).long()}
                scores = model(**asked, pixel_values=test.images * 2 - 1).logits_per_image
        model.save_pretrained(folder)
        caption_tokenizer().save_pretrained(folder)
        right = (scores.argmax(-1) == test.labels).double().mean().item()
        return {"parameters": sum(p.numel() for p in model.parameters()), "zero_shot_accuracy": round(right, 4)}


@dataclass(frozen=True)
class MaskedAutoencoderModel:
    """A ViTMAEForPreTraining of transformers that also learns its places, trained on the digits without their labels.

    Attributes:
        sizes: of its configuration.
    """

    sizes: Mapping[str, Any]
    steps: int
    learning_rate: float
    seed: int = 0

    needs = ()

    def ingredients(self) -> dict[str, Any]:
        rest = {"steps": self.steps, "learning_rate": self.learning_rate, "seed": self.seed}
        return {"sizes": dict(self.sizes), **rest, "torch": torch_release()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        import torch
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        from kdlm.places import embed_places
        from kdlm.sandbox.digits import digits

        train, test = digits()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = embed_places(ViTMAEForPreTraining(ViTMAEConfig(**IMAGES, **self.sizes)))
            for places in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
                places.requires_grad_(True)  # on a grid of 4 most of the sines hardly tell one place from the next

            def error_of(chosen: Any) -> Any:
                return model(train.images[chosen] * 2 - 1).loss

            _fit(model, error_of, len(train.labels), self, progress, name)
            with torch.no_grad():
                error = model(test.images * 2 - 1).loss.item()
        model.save_pretrained(folder)
        return {"parameters": sum(p.numel() for p in model.parameters()), "held_out_error": round(error, 4)}


def _fit(
    model: Any,
    loss_of: Callable[[Any], Any],
    rows: int,
    spec: Any,
    progress: Progress,
    name: str,
    weight_decay: float = 0.0,
) -> None:
    """Train by AdamW with a rate that rises and falls once, on batches drawn from the rows."""
    import torch

    from kdlm.sandbox.pretraining import descend, one_thread

    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.learning_rate, total_steps=spec.steps)
    with one_thread():
        descend(model, lambda: loss_of(torch.randint(rows, (BATCH,))), optimizer, schedule, spec.steps, progress, name)
