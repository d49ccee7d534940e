"""The trainers that on_policy_throughput.py compares: kdlm's and TRL's two, on the same ingredients.

Alike for all: weights, prompts (24 to 40 tokens, in order), 64 new tokens each (the end token lies outside the
vocabulary), batches of 8, divergence at temperature 1, AdamW, fp32, nothing checkpointed or logged. Llama of 2 layers x
96 and 4 x 192. DistillationTrainer reads prompts as text, and gets a tokenizer of one word per id. GKDTrainer has lmbda
1 and a collator that pads ids, since its own wants chats.
"""

import random
from collections.abc import Callable
from typing import Any

from transformers import Trainer

BATCH, NEW, STUDENT, TEACHER = 8, 64, (2, 96), (4, 192)
PROMPTS = range(24, 41)
WAYS = {
    "every 1": {"every": 1},
    "every 4": {"every": 4},
    "every 1, asynchronous": {"every": 1, "asynchronous": True},
    "every 4, asynchronous": {"every": 4, "asynchronous": True},
}


def language_model(layers: int, width: int, vocab: int, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=vocab,
        pad_token_id=0,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def word_tokenizer(vocab: int) -> Any:
    """Return a tokenizer that reads `17` as id 17; its end token is the first id that no model draws."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, **{str(number): number for number in range(1, vocab)}, "<end>": vocab}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def prompts(vocab: int, count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(1, vocab) for _ in range(draw.choice(PROMPTS))] for _ in range(count)]


def settings(folder: str, steps: int) -> dict[str, Any]:
    """Return training arguments for all three, and off what TRL switches on by itself."""
    return {
        **{"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": 1e-3},
        **{"lr_scheduler_type": "constant", "logging_strategy": "no", "save_strategy": "no", "report_to": "none"},
        **{"disable_tqdm": True, "use_cpu": True, "seed": 0, "bf16": False, "gradient_checkpointing": False},
    }


def kdlm(models: dict[str, Any], given: list[list[int]], beta: float, options: dict[str, Any], **way: Any) -> Trainer:
    from transformers import TrainingArguments

    from kdlm import OnPolicyTrainer
    from kdlm.losses import JSD, ReverseKL
    from kdlm.methods import GKD
    from kdlm.rollouts import RolloutSection, Sampling

    return OnPolicyTrainer(
        models["model"],
        models["teacher_model"],
        TrainingArguments(**options, train_sampling_strategy="sequential"),
        method=GKD([ReverseKL() if beta == 1 else JSD(beta=beta)], student_share=1.0),
        rollouts=RolloutSection(sampling=Sampling(max_new_tokens=NEW), **way),
        train_dataset=[{"input_ids": ids, "labels": [-100] * len(ids)} for ids in given],
        processing_class=models["processing_class"],
    )


def distillation(models: dict[str, Any], given: list[list[int]], beta: float, options: dict[str, Any]) -> Trainer:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    args = DistillationConfig(**options, beta=beta, max_completion_length=NEW, shuffle_dataset=False)
    texts = Dataset.from_list([{"prompt": " ".join(map(str, ids))} for ids in given])
    return DistillationTrainer(**models, args=args, train_dataset=texts)


def gkd(models: dict[str, Any], given: list[list[int]], beta: float, options: dict[str, Any]) -> Trainer:
    import torch
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        longest = max(len(row["ids"]) for row in rows)
        gaps = [longest - len(row["ids"]) for row in rows]
        ids = torch.tensor([[0] * gap + row["ids"] for gap, row in zip(gaps, rows, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
        counted = torch.ones(len(rows), NEW, dtype=torch.long)  # GKD divides by the tokens of the data's answers
        return {"prompts": ids, "prompt_attention_mask": mask, "labels": counted}

    args = GKDConfig(
        **options, beta=beta, lmbda=1.0, temperature=1.0, max_new_tokens=NEW, train_sampling_strategy="sequential"
    )
    return GKDTrainer(**models, args=args, train_dataset=Dataset.from_dict({"ids": given}), data_collator=collate)


TRAINERS: dict[str, Callable[..., Trainer]] = {"kdlm": kdlm, "DistillationTrainer": distillation, "GKDTrainer": gkd}


def built(which: str, vocab: int, beta: float, folder: str, steps: int) -> tuple[Trainer, Any]:
    """Return a trainer, or kdlm's with one of the ways to make text, and its student."""
    models = {
        "model": language_model(*STUDENT, vocab, seed=0),
        "teacher_model": language_model(*TEACHER, vocab, seed=1),
        "processing_class": word_tokenizer(vocab),
    }
    build, way = (kdlm, WAYS[which]) if which in WAYS else (TRAINERS[which], {})
    return build(models, prompts(vocab, steps * BATCH), beta, settings(folder, steps), **way), models["model"]
