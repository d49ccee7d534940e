"""Networks of diffusers of a few thousand weights, made from a configuration."""

from typing import Any

import diffusers
import torch


def unet(channels: int = 1, **options: Any) -> diffusers.UNet2DModel:
    """A UNet2DModel on 8 x 8 samples with 10 classes and one that stands for none."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    options = {"sample_size": 8, "num_class_embeds": 11, "add_attention": False} | options
    return diffusers.UNet2DModel(in_channels=channels, out_channels=channels, **sizes, **blocks, **options)


def text_unet(**options: Any) -> diffusers.UNet2DConditionModel:
    """A UNet2DConditionModel on 8 x 8 latents of 4 channels, told by embeddings 12 wide."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options,
    )  # fmt: skip


def sdxl() -> diffusers.UNet2DConditionModel:
    """The same, told also by pooled embeddings 6 wide and by SDXL's six numbers about the image."""
    return text_unet(
        addition_embed_type="text_time", projection_class_embeddings_input_dim=6 + 6 * 8, addition_time_embed_dim=8
    )


def dit() -> diffusers.DiTTransformer2DModel:
    """A DiT with a learned variance: twice as many channels out as in."""
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    return randomised(net)


def sd3() -> diffusers.SD3Transformer2DModel:
    """A Stable Diffusion 3 transformer on 8 x 8 latents of 4 channels."""
    torch.manual_seed(0)
    net = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6,
        pos_embed_max_size=8,
    )  # fmt: skip
    return randomised(net)


def pixart() -> diffusers.PixArtTransformer2DModel:
    """A PixArt transformer, which masks its text."""
    torch.manual_seed(0)
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=12, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip
    return randomised(net)


def randomised(net: Any) -> Any:
    """Return a network whose every weight is random: those that begin at zero would hide what they are told."""
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def condition(batch: int, *keys: str) -> dict[str, torch.Tensor]:
    """A condition with these keys, of random numbers."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mask = torch.ones(batch, 5, dtype=torch.int64)
    mask[0, 3:] = 0
    known = {
        "labels": torch.arange(batch) % 10,
        "encoder_hidden_states": draw(batch, 5, 12),
        "encoder_attention_mask": mask,
        "pooled_projections": draw(batch, 6),
    }
    return {key: known[key] for key in keys}
