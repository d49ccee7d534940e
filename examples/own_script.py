"""kdlm's losses in your own script: a `transformers.Trainer` that learns from a teacher. Under a minute on a CPU.

    python examples/own_script.py             # forward KL on logits
    python examples/own_script.py --chunked   # the same loss from hidden states: no [rows, vocab] tensor is ever alive

Tokens are bytes and the text is the standard library's own source, so that nothing is downloaded.
"""

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from kdlm.losses import chunked, forward_kl, kept_rows, reduce
from kdlm.signal import Head, Hidden, Rows

LENGTH = 64


class Distiller(Trainer):
    """A Trainer whose loss is the divergence to a frozen teacher instead of the cross-entropy to the labels."""

    def __init__(self, *args: Any, teacher: LlamaForCausalLM, temperature: float, chunk: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.divergence = functools.partial(forward_kl, temperature=temperature)
        self.read = hidden if chunk else logits
        self.compare = functools.partial(chunked, self.divergence) if chunk else self.divergence

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows = kept_rows(inputs["labels"])
        with torch.no_grad():
            teacher = self.read(self.teacher, inputs["input_ids"], rows)
        values = self.compare(self.read(model, inputs["input_ids"], rows), teacher)
        # The Trainer counts the tokens of the whole optimiser step on all ranks, and DDP averages over the ranks.
        loss = reduce(values, num_items_in_batch) * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


def logits(model: torch.nn.Module, input_ids: Tensor, rows: Rows) -> Tensor:
    return rows.select(model(input_ids=input_ids).logits)


def hidden(model: torch.nn.Module, input_ids: Tensor, rows: Rows) -> Hidden:
    out = model(input_ids=input_ids, output_hidden_states=True, logits_to_keep=1)
    return Hidden(rows.select(out.hidden_states[-1]), Head(getattr(model, "module", model).lm_head.weight))


def llama(width: int, layers: int) -> LlamaForCausalLM:
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **shape))


def examples(count: int) -> list[dict[str, Tensor]]:
    text = Path(json.__file__).with_name("decoder.py").read_bytes() + Path(argparse.__file__).read_bytes()
    pieces = torch.tensor(list(text)).split(LENGTH)[:count]
    return [{"input_ids": piece, "labels": torch.cat([torch.tensor([-100]), piece[1:]])} for piece in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--chunked", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    teacher, student = llama(width=96, layers=2), llama(width=32, layers=1)
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 25}
        speed = {"per_device_train_batch_size": 16, "dataloader_pin_memory": torch.cuda.is_available()}
        training = TrainingArguments(folder, max_steps=args.steps, learning_rate=3e-3, **quiet, **speed)
        Trainer(teacher, training, train_dataset=examples(1024)).train()
        own = {"teacher": teacher, "temperature": 1.0, "chunk": args.chunked}
        Distiller(student, training, train_dataset=examples(256), **own).train()


if __name__ == "__main__":
    main()
