"""Small dual encoders of 8 x 8 images and captions of five words."""

import torch
from transformers import CLIPConfig, CLIPModel


def small_clip(
    width: int = 16, layers: int = 2, embedding: int = 8, seed: int = 0, text_width: int | None = None
) -> CLIPModel:
    torch.manual_seed(seed)
    tower = {"num_hidden_layers": layers, "num_attention_heads": width // 4, "intermediate_size": 2 * width}
    text = {**tower, "hidden_size": text_width or width, "num_attention_heads": (text_width or width) // 4}
    config = CLIPConfig(
        vision_config={**tower, "hidden_size": width, "image_size": 8, "patch_size": 4, "num_channels": 1},
        text_config={**text, "vocab_size": 20, "max_position_embeddings": 5, "eos_token_id": 1, "bos_token_id": 1},
        projection_dim=embedding,
    )
    return CLIPModel(config)


def pairs(count: int = 8, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (count, 5), generator=generator)
    ids[:, 4] = 1
    ids[::2, 3:] = torch.tensor([1, 0])
    images = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.arange(count)
    return {"pixel_values": images, "input_ids": ids, "attention_mask": (ids != 0).long(), "index": index}
