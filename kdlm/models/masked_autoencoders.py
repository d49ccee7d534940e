"""MaskedAutoencoder: reads a ViT that fills in what is hidden of an image; where one comes from."""

from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from kdlm.features import recorded, run_until
from kdlm.models.configured import Configured
from kdlm.places import embed_places


def is_masked_autoencoder(module: Any) -> bool:
    """Whether a network is transformers' ViT-MAE with its decoder."""
    return type(module).__name__ == "ViTMAEForPreTraining"


class MaskedAutoencoder:
    """Asks a ViTMAEForPreTraining for its predictions and for the features of the patches that it sees.

    Which patches are hidden is decided by noise that the caller gives, one number a patch: the smallest stay.

    Args:
        module: called with images and noise.
    """

    provides = frozenset({"teacher.masked"})

    def __init__(self, module: Any):
        self.module = module

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.module.vit.embeddings.position_embeddings.shape[1] - 1

    @property
    def num_blocks(self) -> int:
        """Blocks of the encoder."""
        return self.module.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.module.config.hidden_size

    @property
    def mask_ratio(self) -> float:
        """Share of the patches that are hidden."""
        return self.module.config.mask_ratio

    def encoded(
        self, images: Float[Tensor, "batch channels height width"], noise: Float[Tensor, "batch patches"], block: int
    ) -> Float[Tensor, "batch seen hidden"]:
        """Return what a block of the encoder gives for the class and the patches that are seen; no later one is run."""
        return run_until(self.module, f"vit.layers.{block}", images, noise=noise)

    def reconstructed(
        self, images: Float[Tensor, "batch channels height width"], noise: Float[Tensor, "batch patches"], block: int
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch seen hidden"]]:
        """Return each image's mean squared error over the pixels of hidden patches, and what `encoded` gives.

        The pixels are normalised within a patch where the model's configuration says so (`norm_pix_loss`).
        """
        path = f"vit.layers.{block}"
        with recorded(self.module, [path]) as features:
            output = self.module(images, noise=noise)
        target = self.module.patchify(images)
        if self.module.config.norm_pix_loss:
            spread = (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
            target = (target - target.mean(dim=-1, keepdim=True)) / spread
        errors = (output.logits.float() - target.float()).square().mean(-1)
        return (errors * output.mask).sum(1) / output.mask.sum(1), features[path]


class MaskedAutoencoderSource(Configured):
    """A masked autoencoder (ViT-MAE)."""

    kind: ClassVar = "ViTMAEForPreTraining"
    sandbox: ClassVar = ("digits-mae",)

    name: Literal["masked_autoencoder"] = "masked_autoencoder"

    def load(self) -> Any:
        """Open or make the weights. Raises ValueError naming the path when there is no such model."""
        model = super().load()
        return model if self.path is not None else embed_places(model)


class MaskedAutoencoderStudent(MaskedAutoencoderSource):
    """A masked autoencoder to train."""
