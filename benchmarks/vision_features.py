"""Distillation without classes on the digits: affinities of images and texts, and masked autoencoders.

    python benchmarks/vision_features.py [--check] [--quick] [--save]

Two pairs of arms, each on several seeds, an equal number of steps and one trainer:

    affinity   50 pairs of a digit and a caption are known; a small dual encoder learns from them by CLIP's own loss, or
               mimics the affinities of `digits-clip` (TinyCLIP) between all 1,438 digits and captions in any order,
               of which no pair is known. Judged by zero-shot accuracy on the 359 held-out digits.
    dmae       1,438 digits without labels; a small masked autoencoder alone, or with features of its last block that
               follow those of `digits-mae`'s (DMAE). Judged by a linear probe on 200 labels, on the held-out digits.

Gap closed is (taught - alone) / (teacher - alone).

--check exits 1 unless mimicking closes at least 60 % of the gap in the mean over seeds, and DMAE at least 15 % on every
seed. --quick takes one seed and few steps: a smoke test that gates nothing. --save writes
benchmarks/results/vision_features.json.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

ROOT = Path(__file__).resolve().parent.parent
GATES = {"affinity": 0.60, "dmae": 0.15}
PAIRS, PROBED = 50, 200
BATCH, RATE = 128, 3e-3
LAST = (2, 2)  # of three blocks each, counted from 0: the one that the probe reads
WHOLE = {"seeds": 3, "affinity": 800, "dmae": 800}
QUICK = {"seeds": 1, "affinity": 3, "dmae": 3}

CLIP = {
    "projection_dim": 8,
    "vision_config": {
        "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 48, "projection_dim": 8,
    },
    "text_config": {
        "max_position_embeddings": 6, "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0, "hidden_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "projection_dim": 8,
    },
}  # fmt: skip
MAE = {
    "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 32, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "initializer_range": 0.08,
}  # fmt: skip


def trained(student: Any, teacher: Any, method: Any, rows: Any, steps: int, seed: int) -> Any:
    """Return the student after some steps of a method, on all rows at once where they are fewer than a batch."""
    from transformers import PrinterCallback, TrainingArguments

    from kdlm import DistillTrainer
    from kdlm.data import stacked

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, report_to="none", use_cpu=True, max_steps=steps, per_device_train_batch_size=BATCH,
            learning_rate=RATE, lr_scheduler_type="cosine", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, seed=seed, dataloader_pin_memory=False,
        )  # fmt: skip
        torch.manual_seed(seed)
        trainer = DistillTrainer(
            student, teacher, args, method=method, train_dataset=rows, data_collator=stacked,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return student.eval()


def affinity_arms(seed: int, steps: int) -> dict[str, float]:
    """Return the zero-shot accuracy of a student by CLIP's loss, of one that mimics, and of the teacher."""
    from kdlm.data import CaptionsSection, TensorRows
    from kdlm.methods import Affinity
    from kdlm.models import DualEncoderSource
    from kdlm.sandbox.captions import WORDS

    every = CaptionsSection().load(0).train.columns
    images = torch.randperm(len(every["index"]) // 3, generator=torch.Generator().manual_seed(seed))[:PAIRS]
    known = TensorRows({key: column[3 * images + images % 3] for key, column in every.items()})
    loose = {key: column[::3] for key, column in every.items()}
    order = torch.randperm(len(every["index"]), generator=torch.Generator().manual_seed(seed))[: len(loose["index"])]
    loose |= {key: every[key][order] for key in ("input_ids", "attention_mask")}  # no pair is known of these
    teacher = DualEncoderSource(path="sandbox:digits-clip").load()
    config = {**CLIP, "text_config": {**CLIP["text_config"], "vocab_size": len(WORDS)}}
    found = {"teacher": zero_shot(teacher.eval())}
    for name, share in (("alone", 0.0), ("taught", 1.0)):
        student = DualEncoderSource(config=config, seed=seed).load()
        asked = teacher if share else None
        rows = TensorRows(loose) if share else known
        found[name] = zero_shot(trained(student, asked, Affinity(share=share), rows, steps, seed))
    return found


@torch.no_grad()
def zero_shot(model: Any) -> float:
    """Return the accuracy of naming held-out digits by their nearest caption, the mean of the three of a digit."""
    from kdlm.models import DualEncoder
    from kdlm.sandbox.captions import caption_ids
    from kdlm.sandbox.digits import digits

    encoder, ids, (_, test) = DualEncoder(model), caption_ids(), digits()
    texts = encoder.texts(ids.flatten(0, 1), (ids.flatten(0, 1) != 0).long()).unflatten(0, ids.shape[:2]).mean(1)
    scores = encoder.images(test.images * 2 - 1) @ normalize(texts, dim=-1).T
    return (scores.argmax(-1) == test.labels).double().mean().item()


def dmae_arms(seed: int, steps: int) -> dict[str, float]:
    """Return the linear probe of a masked autoencoder alone, of one that is taught, and of the teacher."""
    from kdlm.data import TensorRows
    from kdlm.methods import DMAE
    from kdlm.models import MaskedAutoencoderSource
    from kdlm.sandbox.digits import digits

    train, _ = digits()
    rows = TensorRows({"pixel_values": train.images * 2 - 1, "index": torch.arange(len(train.labels))})
    teacher = MaskedAutoencoderSource(path="sandbox:digits-mae").load()
    found = {"teacher": probe(teacher.eval(), seed)}
    for name, weight in (("alone", 0.0), ("taught", 1.0)):
        student = MaskedAutoencoderSource(config=MAE, seed=seed).load()
        asked = teacher if weight else None
        student = trained(student, asked, DMAE(weight=weight, blocks=LAST), rows, steps, seed)
        found[name] = probe(student, seed)
    return found


def probe(model: Any, seed: int) -> float:
    """Return the accuracy on held-out digits of a linear classifier of 200 labelled ones, on the encoder's features."""
    from kdlm.sandbox.digits import digits

    train, test = digits()
    chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))[:PROBED]
    features = [pooled(model, images) for images in (train.images[chosen], test.images)]
    mean, spread = features[0].mean(0), features[0].std(0) + 1e-6
    features = [(x - mean) / spread for x in features]
    weight = torch.zeros(features[0].shape[1] + 1, 10, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def scores(x: Tensor) -> Tensor:
        return x @ weight[:-1] + weight[-1]

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = cross_entropy(scores(features[0]), train.labels[chosen]) + 1e-2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        return (scores(features[1]).argmax(-1) == test.labels).double().mean().item()


@torch.no_grad()
def pooled(model: Any, images: Tensor) -> Tensor:
    """Return the mean over all patches of what the encoder gives, with nothing hidden."""
    ratio, model.vit.config.mask_ratio = model.vit.config.mask_ratio, 0.0
    try:
        return model.vit(images * 2 - 1).last_hidden_state[:, 1:].mean(1)
    finally:
        model.vit.config.mask_ratio = ratio


def gap_closed(arms: dict[str, float]) -> float:
    """Return the share of the way from the student alone to the teacher."""
    return (arms["taught"] - arms["alone"]) / max(arms["teacher"] - arms["alone"], 1e-9)


def run(sizes: dict[str, int]) -> dict[str, list[dict[str, float]]]:
    """Train and judge every arm on every seed."""
    found: dict[str, list[dict[str, float]]] = {}
    for name, arms_of in (("affinity", affinity_arms), ("dmae", dmae_arms)):
        for seed in range(sizes["seeds"]):
            arms = arms_of(seed, sizes[name])
            found.setdefault(name, []).append({**arms, "gap_closed": gap_closed(arms)})
            print(f"{name}, seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[name][-1].items()), flush=True)
    return found


def verdict(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the figure of each gate, the mean of affinity's and the least of dmae's, and whether both are met."""
    gaps = {name: [arms["gap_closed"] for arms in each] for name, each in found.items()}
    figures = {"affinity": sum(gaps["affinity"]) / len(gaps["affinity"]), "dmae": min(gaps["dmae"])}
    return {"gap_closed": figures, "met": all(figures[name] >= gate for name, gate in GATES.items())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a gate is missed")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: a smoke test")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/vision_features.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = QUICK if args.quick else WHOLE
    found = run(sizes)
    judged = verdict(found)
    seconds = sum(os.times()[:4])
    if args.save:
        from machine import described

        about = {
            "machine": described(),
            "settings": {**sizes, "pairs": PAIRS, "probed": PROBED},
            "cpu_seconds": seconds,
        }
        path = ROOT / "benchmarks" / "results" / "vision_features.json"
        path.write_text(json.dumps({**about, **judged, "arms": found}, indent=1) + "\n")
    print(f"{seconds:.0f} s of one core")
    figures = judged["gap_closed"]
    print(f"gap closed: affinity {figures['affinity']:.0%} in the mean, dmae {figures['dmae']:.0%} at the least")
    return 1 if args.check and not args.quick and not judged["met"] else 0


if __name__ == "__main__":
    sys.exit(main())
