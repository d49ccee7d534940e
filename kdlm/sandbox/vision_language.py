"""The vision-language models, as the catalogue has them: small LLaVAs that answer questions about the digits."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlm.sandbox.digits_questions import NAMES, QUESTIONS
from kdlm.sandbox.language_models import no_bars, torch_release
from kdlm.sandbox.progress import Progress
from kdlm.sandbox.tokenizer import EOS, PAD, TURN_END, TURN_START

IMAGE, UNKNOWN = "<image>", "<unk>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% set said %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endset %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ said + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ said + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class VisionLanguageModel:
    """A LLaVA: a SigLIP tower on patches of the 8 x 8 images, a projector, and a Qwen3 of whole words.

    Attributes:
        width, layers, heads: of the tower and of the language model alike.
        patch: width of a patch; an image becomes `(8 / patch)^2` tokens.
        steps: of training on `digits-questions`; 0 leaves the weights as they are drawn.
        batch, learning_rate: of the training; the rate is that of its peak.
    """

    width: int
    layers: int
    heads: int
    patch: int
    seed: int
    steps: int = 0
    batch: int = 32
    learning_rate: float = 1e-3

    @property
    def needs(self) -> tuple[str, ...]:
        return ("digits-questions",) if self.steps else ()

    def ingredients(self) -> dict[str, Any]:
        return {**asdict(self), "torch": torch_release(), "words": list(words())}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        import torch
        from transformers import LlavaForConditionalGeneration

        reads = processor(self.patch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = LlavaForConditionalGeneration(self.config(reads.tokenizer))
        figures: dict[str, Any] = {"parameters": model.num_parameters()}
        if self.steps:
            from kdlm.sandbox.vision_language_training import train

            figures |= train(model, reads, built["digits-questions"], self, progress, name)
        with no_bars():
            model.save_pretrained(folder)
        reads.save_pretrained(folder)
        return figures

    def config(self, tokenizer: Any) -> Any:
        from transformers import LlavaConfig, Qwen3Config, SiglipVisionConfig

        shape: dict[str, Any] = {
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }
        text = Qwen3Config(
            vocab_size=len(tokenizer),
            num_key_value_heads=self.heads,
            head_dim=self.width // self.heads,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )
        return LlavaConfig(
            vision_config=SiglipVisionConfig(image_size=8, patch_size=self.patch, vision_use_head=False, **shape),
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",  # SigLIP has no class token to leave out
            tie_word_embeddings=True,
            dtype="float32",
        )


def words() -> tuple[str, ...]:
    """Return the vocabulary, in the order of its ids."""
    asked = (word for question in QUESTIONS for word in question.split())
    every = (EOS, PAD, TURN_START, TURN_END, IMAGE, UNKNOWN, "user", "assistant", *asked, "yes", "no", *NAMES)
    return tuple(dict.fromkeys(every))


def processor(patch: int) -> Any:
    """Return what turns images of 8 x 8 and conversations of known words into the inputs of a model of this patch."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[EOS, TURN_START, IMAGE],
        clean_up_tokenization_spaces=False,
    )
    size = {"height": 8, "width": 8}
    images = image_processor_class()(
        do_resize=False, do_center_crop=False, size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images, wrapped, patch_size=patch, vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE
    )


def image_processor_class() -> Any:
    """Return CLIP's processor of images: on torchvision where that is installed, else on pillow alone."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil
