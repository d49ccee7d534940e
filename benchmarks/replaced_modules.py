"""Students with other modules inside: mixers in place of attention.

    python benchmarks/replaced_modules.py [--check] [--quick] [--save]

Two teachers of 0.2 million weights are trained on the sandbox's code first, a Qwen3 and a Llama.

Mixers: three of the four layers lose their attention, to gated DeltaNet (Qwen3) or Mamba-2 (Llama). The mixers begin as
that attention (MaTVLM, The Mamba in the Llama) or as the architecture draws them, and learn by forward KL alone (plain
KD), or with `layer_matching` beside it. All train on equal text; each arm runs on several seeds.

Judged by the KL to the teacher on held-out text.

--check exits 1 unless, in the mean over seeds, mixers that begin as attention end nearer to the teacher than drawn ones
for each teacher, with plain KD. The figure is the last line: the KL of drawn mixers over that of inherited ones.
--quick takes one seed and few steps, and gates nothing. --save writes benchmarks/results/replaced_modules.json.
"""

import sys
import tempfile
import time
from statistics import mean
from typing import Any, NamedTuple

import torch
from command import options, save

LAYERS = (1, 2, 3)
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True, "head_dim": 16,
}  # fmt: skip
ARMS = (("attention", "kd"), ("random", "kd"), ("attention", "layer_matching"))


class Plan(NamedTuple):
    """How long the teachers and the students with mixers train."""

    seeds: int = 3
    teacher: int = 800
    mixers: int = 30
    documents: int = 60
    held_out: int = 2
    batch: int = 8
    length: int = 64
    rate: float = 3e-3


QUICK = Plan(seeds=1, teacher=4, mixers=2, documents=2, held_out=1)


def teacher(kind: str, plan: Plan) -> Any:
    """Return a small language model trained on the sandbox's code."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from kdlm.sandbox import build
    from kdlm.sandbox.language_models import Training
    from kdlm.sandbox.pretraining import pretrain
    from kdlm.sandbox.progress import silent

    tokenizer = AutoTokenizer.from_pretrained(build("code-tokenizer-tiny"))
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = (
        Qwen3ForCausalLM(Qwen3Config(**SIZES, **special))
        if kind == "qwen3"
        else LlamaForCausalLM(LlamaConfig(**SIZES, **special))
    )
    training = Training("train", plan.teacher, plan.batch, plan.length, 3e-3)
    figures = pretrain(model, tokenizer, build("code"), training, 0, silent, kind)
    print(f"{kind}: held-out cross-entropy {figures['held_out_loss']}", flush=True)
    return model


def text(plan: Plan) -> Any:
    from transformers import AutoTokenizer

    from kdlm.data import DataSection, load_data
    from kdlm.sandbox import build

    rows = {
        "train": [{"path": "sandbox:code/train", "limit": plan.documents}],
        "eval": [{"path": "sandbox:code/eval", "limit": plan.held_out}],
        "max_length": plan.length,
    }
    return load_data(DataSection.model_validate(rows), AutoTokenizer.from_pretrained(build("code-tokenizer-tiny")))


def trained(student: Any, whose: Any, method: Any, data: Any, plan: Plan, steps: int, seed: int) -> dict[str, float]:
    """Train a student in place, and return what evaluation says of it."""
    from transformers import PrinterCallback, TrainingArguments

    from kdlm import DistillTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, report_to="none", use_cpu=True, max_steps=max(1, steps), seed=seed, adam_beta2=0.95,
            learning_rate=plan.rate, lr_scheduler_type="cosine", warmup_steps=steps // 10, save_strategy="no",
            per_device_train_batch_size=plan.batch, per_device_eval_batch_size=32, logging_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = DistillTrainer(
            student, whose, args, method=method, train_dataset=data.train, eval_dataset=data.eval,
            data_collator=data.collator,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if steps:
            trainer.train()
        return {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}


def mixers(kind: str, model: Any, data: Any, plan: Plan, seed: int) -> list[dict[str, Any]]:
    """Return the held-out KL of every arm, before and after it was trained."""
    from kdlm.losses import ForwardKL
    from kdlm.methods import LayerMatching, LogitKD
    from kdlm.models.hybrids import hybrid

    found = []
    for begun, how in ARMS:
        student = hybrid(model, LAYERS, from_attention=begun == "attention", seed=seed)
        for module in student.modules():
            if hasattr(module, "chunk_size"):  # of Mamba-2's scan: the result is the same, on short text it is faster
                module.chunk_size = plan.length
        method = LogitKD([ForwardKL()]) if how == "kd" else LayerMatching([ForwardKL()])
        began = trained(student, model, LogitKD([ForwardKL()]), data, plan, 0, seed)["kl_to_teacher"]
        ended = trained(student, model, method, data, plan, plan.mixers, seed)["kl_to_teacher"]
        found.append({"teacher": kind, "seed": seed, "mixers": begun, "method": how, "start": began, "kl": ended})
        print(f"  {kind} seed {seed}: {begun:<10}{how:<16}KL {began:.3f} -> {ended:.4f}", flush=True)
    return found


def of(rows: list[dict[str, Any]], value: str, **which: Any) -> float:
    """Return the mean of a value over the rows of an arm."""
    return mean(row[value] for row in rows if all(row[key] == wanted for key, wanted in which.items()))


def summarised(arms: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Print and return the means over seeds, and what the gates miss."""
    means = []
    for kind in ("qwen3", "llama"):
        for begun, how in ARMS:
            arm = {"teacher": kind, "mixers": begun, "method": how}
            means.append(arm | {key: of(arms, key, **arm) for key in ("start", "kl")})
    for row in means:
        print("  ".join(f"{value:.4f}" if isinstance(value, float) else f"{value:<14}" for value in row.values()))
    missed = [
        f"{kind}: mixers begun as attention end at {ours:.4f}, drawn ones at {drawn:.4f}"
        for kind in ("qwen3", "llama")
        for ours, drawn in [[of(means, "kl", teacher=kind, mixers=m, method="kd") for m in ("attention", "random")]]
        if ours >= drawn
    ]
    return means, missed


def main() -> int:
    args = options(__doc__)
    plan = QUICK if args.quick else Plan()
    began, data = time.process_time(), text(plan)
    models = {kind: teacher(kind, plan) for kind in ("qwen3", "llama")}
    seeds = range(plan.seeds)
    arms = [one for seed in seeds for kind, model in models.items() for one in mixers(kind, model, data, plan, seed)]
    means, missed = summarised(arms)
    seconds = time.process_time() - began
    if args.save:
        result = {"plan": plan._asdict(), "seconds": round(seconds), "means": means}
        result |= {"missed": missed, "mixers": arms}
        save("replaced_modules", result)
    print(*(f"missed: {one}" for one in missed if not args.quick), f"{seconds:.0f} s of one core", sep="\n")
    ratios = [
        of(arms, "kl", mixers="random", method="kd", teacher=k)
        / of(arms, "kl", mixers="attention", method="kd", teacher=k)
        for k in models
    ]
    print(f"KL of drawn mixers over that of inherited ones: {ratios[0]:.2f} (Qwen3), {ratios[1]:.2f} (Llama)")
    return 1 if args.check and not args.quick and missed else 0


if __name__ == "__main__":
    sys.exit(main())
