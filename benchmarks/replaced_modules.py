"""Students with other modules inside: mixers in place of attention, and layers that compute as much as a token needs.

    python benchmarks/replaced_modules.py [--check] [--quick] [--save] [--seeds N]

Two teachers of 0.2 million weights are trained on the sandbox's code first, a Qwen3 and a Llama.

Mixers: two of the four layers lose their attention, to gated DeltaNet (Qwen3) or Mamba-2 (Llama). The mixers begin as
that attention (MaTVLM, The Mamba in the Llama) or as the architecture draws them, and learn by forward KL alone (plain
KD), or with `layer_matching` beside it. All train on equal text; each arm runs on several seeds.

Budgets: the Qwen3's layers are divided into four learners, which learn in ACM's three stages, for three budgets. Beside
each stands a student of equal cost in the mean: the Qwen3 with as many neurons cut, by plain KD for as many tokens as
the three stages have together.

Judged by the KL to the teacher on held-out text, of an adaptive student at its gates' likeliest choices, and by the
share of learners that it then uses.

--check exits 1 unless, in the mean over seeds, mixers that begin as attention end nearer to the teacher than drawn ones
for each teacher, with plain KD, and unless the mean share is within 0.02 of each budget and a larger budget is nearer
to the teacher. The figure is the last line: the KL of drawn mixers over that of inherited ones. --quick takes one seed
and few steps, and gates nothing. --save writes benchmarks/results/replaced_modules.json.
"""

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).resolve().parent.parent
LAYERS, LEARNERS, BUDGETS = (1, 3), 4, (0.25, 0.5, 0.75)
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True, "head_dim": 16,
}  # fmt: skip
OFF = 0.02


class Plan(NamedTuple):
    """How long the teachers, the students with mixers, and each stage of the adaptive ones train."""

    seeds: int = 3
    teacher: int = 500
    mixers: int = 100
    stages: tuple[int, int, int] = (60, 40, 200)
    documents: int = 60
    held_out: int = 2
    batch: int = 8
    length: int = 64
    rate: float = 2e-3


QUICK = Plan(seeds=1, teacher=4, mixers=2, stages=(2, 2, 2), documents=2, held_out=1)


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
            output_dir=folder, report_to="none", use_cpu=True, max_steps=max(1, steps), seed=seed, learning_rate=plan.rate,
            per_device_train_batch_size=plan.batch, per_device_eval_batch_size=32, lr_scheduler_type="cosine",
            warmup_steps=steps // 10, save_strategy="no", logging_strategy="no", disable_tqdm=True, adam_beta2=0.95,
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
    for begun in ("attention", "random"):
        for how in ("kd", "layer_matching"):
            student = hybrid(model, LAYERS, from_attention=begun == "attention", seed=seed)
            for module in student.modules():
                if hasattr(
                    module, "chunk_size"
                ):  # of Mamba-2's scan: the result is the same, on short text it is faster
                    module.chunk_size = plan.length
            method = LogitKD([ForwardKL()]) if how == "kd" else LayerMatching([ForwardKL()])
            began = trained(student, model, LogitKD([ForwardKL()]), data, plan, 0, seed)["kl_to_teacher"]
            ended = trained(student, model, method, data, plan, plan.mixers, seed)["kl_to_teacher"]
            found.append({"teacher": kind, "seed": seed, "mixers": begun, "method": how, "start": began, "kl": ended})
            print(f"  {kind} seed {seed}: {begun:<10}{how:<16}KL {began:.3f} -> {ended:.4f}", flush=True)
    return found


def budgets(model: Any, data: Any, plan: Plan, seed: int) -> list[dict[str, Any]]:
    """Return share and held-out KL for every budget, and the KL of a pruned student of that cost."""
    from kdlm.losses import ForwardKL
    from kdlm.methods import ACM, LogitKD
    from kdlm.models import adaptive_layers
    from kdlm.models.adaptive_student import described, make_adaptive
    from kdlm.models.loading import Width
    from kdlm.models.pruning import prune

    first = copy.deepcopy(model).requires_grad_(True)
    described(first.config, None, LEARNERS)
    for layer in adaptive_layers(make_adaptive(first)).values():
        layer.order()
    errors = trained(first, model, ACM(stage="learners"), data, plan, plan.stages[0], seed)
    errors = [errors[f"error_{n}"] for n in range(1, LEARNERS + 1)]
    trained(first, model, ACM(stage="gates"), data, plan, plan.stages[1], seed)
    print(f"  seed {seed}: errors with 1, 2 ... learners {[round(error, 5) for error in errors]}", flush=True)
    found = []
    for budget in BUDGETS:
        student = copy.deepcopy(first)
        method = ACM([ForwardKL()], budget=budget)
        ended = trained(student, model, method, data, plan, plan.stages[2], seed)
        pruned = prune(model, None, Width(intermediate_size=int(SIZES["intermediate_size"] * budget)))
        cut = trained(pruned, model, LogitKD([ForwardKL()]), data, plan, sum(plan.stages), seed)["kl_to_teacher"]
        one = {"seed": seed, "budget": budget, "share": ended["share"], "kl": ended["kl_to_teacher"], "pruned": cut}
        found.append(one | {"errors": errors})
        print(
            f"  seed {seed}: budget {budget} share {one['share']:.3f} KL {one['kl']:.4f}, pruned {cut:.4f}", flush=True
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, what in (
        ("check", "exit 1 if a gate is missed"),
        ("quick", "one seed, few steps"),
        ("save", "write the results"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=what)
    parser.add_argument("--seeds", type=int, help="seeds, in place of the plan's")
    parser.add_argument("--only", choices=("mixers", "budgets"), help="one part alone; gates nothing")
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan()
    plan = plan if args.seeds is None else plan._replace(seeds=args.seeds)
    torch.set_num_threads(1)
    began, data = time.process_time(), text(plan)
    models = {kind: teacher(kind, plan) for kind in ("qwen3", "llama")}
    seeds = range(plan.seeds)
    arms = [
        one
        for kind in models
        for seed in seeds
        if args.only != "budgets"
        for one in mixers(kind, models[kind], data, plan, seed)
    ]
    shares = [one for seed in seeds if args.only != "mixers" for one in budgets(models["qwen3"], data, plan, seed)]
    print(f"{time.process_time() - began:.0f} s of one core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
