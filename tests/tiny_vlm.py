"""Tiny vision-language models, their processor, and rows of images with questions, for tests."""

import io
from typing import Any

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from kdlm.sandbox.vision_language import VisionLanguageModel, processor

QUESTIONS = ("which digit is this ?", "is this digit even ?", "which digit follows this one ? yes no")


def tiny_vlm(seed: int, *, width: int = 16, layers: int = 1, patch: int = 4) -> LlavaForConditionalGeneration:
    """A LLaVA of a few thousand weights."""
    torch.manual_seed(seed)
    spec = VisionLanguageModel(width=width, layers=layers, heads=2, patch=patch, seed=seed)
    model = LlavaForConditionalGeneration(spec.config(processor(patch).tokenizer))
    for parameter in model.parameters():  # larger than transformers draws them: everything then shows in the output
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def picture(seed: int) -> bytes:
    """An image of 8 x 8 as the bytes of a PNG file."""
    pixels = torch.randint(0, 256, (8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG")
    return file.getvalue()


def rendered(count: int, *, images: int = 1) -> list[dict[str, Any]]:
    """Rows as `ImageTextSection` renders them; questions differ in length, and so do the rows."""
    rows = []
    for number in range(count):
        asked = f"<|im_start|>user\n{'<image>' * images}{QUESTIONS[number % 3]}<|im_end|>\n<|im_start|>assistant\n"
        said = ("seven<|im_end|>", "yes no yes<|im_end|>")[number % 2]
        rows.append(
            {
                "text": f"{asked}{said}\n",
                "spans": [len(asked), len(asked) + len(said)],
                "images": [{"bytes": picture(10 * number + image), "path": None} for image in range(images)],
                "place": f"rows.jsonl:{number + 1}",
                "index": number,
                "domain": 0,
            }
        )
    return rows
