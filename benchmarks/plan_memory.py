"""Memory that `kdlm plan` predicts beside memory that `kdlm train` takes, on a CPU, for seven set-ups.

    python benchmarks/plan_memory.py [--quick] [--check] [--save]

Full fine-tuning, LoRA, eager logits (a dense signal and all rows at once), a cached teacher, one that answers two
micro-batches in one turn (`placement: sliced`), a long sequence, and that with activation checkpointing. A CPU has no
memory apart for a sliced teacher to leave: as a stand-in its weights lie on disk while they rest, so that the process
holds what a device would; the plan is told so. Models are made from configurations, with random weights: 24 M and 37 M
of them, 16,000 tokens, fp32, one thread.
Rows are bytes of text, all of the greatest length but one in eight. Each run is two
optimiser steps in a process of its own, measured in two ways:

- resident: `kdlm train`, the peak of the resident set beyond what it is after the same run with tiny models. glibc is
  told to give blocks beyond 64 KiB back at once (MALLOC_MMAP_THRESHOLD_), so that what is resident is in use.
- allocated: the same trainer under torch's profiler, which sees every tensor of a CPU as torch allocates and frees it.

The prediction is that of the tensors, without the framework. Weights, teacher and optimiser are also compared by
themselves; of the peak, the rest is gradients, activations and losses. The pace is reported and has no gate.

--check exits 1 unless the prediction is within 15 % of both measurements for every set-up; --quick takes two of them.
The figure is the largest of these errors.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GATE, MIB = 0.15, 2**20
VOCAB, STEPS = 16_000, 2
STUDENT = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6, "num_attention_heads": 6}
TEACHER = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LONG = {"data.max_length": 2048, "training.per_device_train_batch_size": 1}
SETUPS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"student.lora": {"rank": 16}},
    "eager": {"method.chunk_rows": 4096, "teacher.signal": "dense"},
    "cached": {"teacher": "cached"},
    "long": LONG,
    "sliced": {
        **{"teacher.placement": "sliced", "teacher.batch_size": 4},
        **{"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2},
    },
    "checkpointing": LONG | {"training.gradient_checkpointing": True},
}
QUICK = ("lora", "eager")
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""},
    **{"HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
}


def recipe_of(setup: str, folder: Path, run: str, *, tiny: bool = False) -> Any:
    """Return the recipe of a set-up, all its files below `folder`, with tiny models or the set-up's own."""
    from kdlm.recipe import Recipe

    teacher: dict[str, Any] = {"name": "local", "path": str(folder / ("tiny" if tiny else "teacher"))}
    data: dict[str, Any] = {
        "student": {"name": "fresh", "config_from": str(folder / ("tiny" if tiny else "student"))},
        "teacher": teacher,
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 256, "cache": str(folder / "cache")},
        "method": {"name": "logit_kd"},
        "losses": [{"name": "forward_kl"}],
        "training": {
            **{"max_steps": STEPS, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 1},
            **{"train_sampling_strategy": "sequential", "save_strategy": "no"},
        },
        "run_dir": str(folder / f"{setup}-{run}-{'tiny' if tiny else 'own'}"),
    }
    for key, value in SETUPS[setup].items():
        where, _, name = key.rpartition(".")
        (data[where] if where else data)[name] = value
    if data["teacher"] == "cached":
        path = str(folder / ("captured-tiny" if tiny else "captured"))
        data["teacher"] = {"name": "cached", "path": path, "of": teacher, "format": {"name": "top_k", "k": 64}}
    return Recipe.model_validate(data)


def write_inputs(folder: Path) -> None:
    """Write a tokenizer of bytes, configurations, random weights of the teachers, and rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    ids = {token: number for number, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    for name, sizes in (("student", STUDENT), ("teacher", TEACHER), ("tiny", TINY)):
        fast.save_pretrained(folder / name)
        config = LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=4096, eos_token_id=0, pad_token_id=0)
        config.architectures = ["LlamaForCausalLM"]
        if name == "student":
            config.save_pretrained(folder / name)
        else:
            LlamaForCausalLM(config).save_pretrained(folder / name)
    lengths = (1980, 2040, 2040, 2040)
    rows = [json.dumps({"text": ("kdlm " * 500)[:length]}) for length in lengths]
    (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows))


def rest_on_disk(folder: Path) -> None:
    """Let the weights of a sliced teacher lie in files while they rest: nothing else of it is in this process."""
    import torch

    from kdlm.teachers import ahead, placement

    class OnDisk(placement.Shelf):
        def __init__(self, model: Any, device: Any, stay: Any = ()) -> None:
            stay = [one for one in stay if one is not None]
            for one in stay:  # a file is read into one storage, which would stay with it; on a GPU `to` copies
                one.data = one.data.clone()
            super().__init__(model, device, stay)

        def _rest(self, parameter: Any) -> Any:
            weight = parameter.data.contiguous()
            file = folder / f"weight-{id(parameter)}"
            weight.numpy().tofile(file)
            return file, weight.shape, weight.dtype

        def fetch(self) -> None:
            for parameter, (file, shape, dtype) in self._resting:
                parameter.data = torch.empty(shape, dtype=dtype)
                with file.open("rb") as opened:
                    opened.readinto(parameter.data.numpy().data.cast("B"))

        def put_back(self) -> None:
            for parameter, (_, _, dtype) in self._resting:
                parameter.data = torch.empty(0, dtype=dtype)

    ahead.Shelf = OnDisk


def resident(setup: str, folder: Path) -> dict[str, Any]:
    """Train by the command's own function; return the peak of the resident set and the pace of the last step."""
    from loss_memory_cpu import resident

    from kdlm.train import train

    rest_on_disk(folder)
    train(recipe_of(setup, folder, "resident", tiny=True))
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    run = train(recipe_of(setup, folder, "resident"))
    taken = resident("VmHWM") - before
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"resident": taken, "tokens_per_second": [x["tokens_per_second"] for x in logged if "loss" in x][-1]}


def allocated(setup: str, folder: Path) -> dict[str, Any]:
    """Train under the profiler, and predict; return the peak of what was allocated, by part, and the prediction."""
    from torch.profiler import ProfilerActivity, profile

    from kdlm.plan import device, predict
    from kdlm.train import assemble

    rest_on_disk(folder)
    recipe = recipe_of(setup, folder, "allocated")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        trainer = assemble(recipe).trainer
        trainer.train()
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += change
        peak = max(peak, held)
    states = [x for state in trainer.optimizer.state.values() for x in state.values()]
    teacher = getattr(trainer.teacher, "model", None)
    parts = {
        "weights": sizes(trainer.student.parameters()),
        "optimiser": sizes(states),
        "teacher weights": sizes([] if teacher is None else teacher.parameters()),
    }
    found = predict(recipe, replace(device("cpu"), apart=True))
    predicted = found.as_dict()["memory"] | {"tensors": found.tensors, "tokens_per_second": found.tokens_per_second}
    return {"allocated": peak, "parts": parts | {"rest": peak - sum(parts.values())}, "predicted": predicted}


def sizes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def captured(setup: str, folder: Path) -> dict[str, Any]:
    """Capture both teachers."""
    from kdlm.capture import capture

    for tiny in (True, False):
        capture(recipe_of(setup, folder, "capture", tiny=tiny))
    return {}


def inputs(setup: str, folder: Path) -> dict[str, Any]:
    write_inputs(folder)
    return {}


WAYS = {way.__name__: way for way in (inputs, captured, resident, allocated)}


def alone(way: str, setup: str, folder: Path) -> dict[str, Any]:
    """Run one of the ways in a process of its own. Raises RuntimeError with what it said where it fails."""
    command = [sys.executable, __file__, "--way", way, "--setup", setup, "--folder", str(folder)]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path[1:]])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{setup}, {way}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(setup: str, folder: Path) -> dict[str, Any]:
    """Measure a set-up in both ways, print its line and return all figures."""
    if "cached" in SETUPS[setup].values():
        alone("captured", setup, folder)
    row = {"setup": setup} | alone("resident", setup, folder) | alone("allocated", setup, folder)
    tensors = row["predicted"]["tensors"]
    row["errors"] = {way: tensors / row[way] - 1 for way in ("resident", "allocated")}
    row["pace_ratio"] = row["predicted"]["tokens_per_second"] / row["tokens_per_second"]
    figures = "".join(f"{value / MIB:>11.0f}" for value in (tensors, row["resident"], row["allocated"]))
    errors = "".join(f"{row['errors'][way]:>+11.1%}" for way in ("resident", "allocated"))
    print(f"{setup:<15}{figures}{errors}{row['predicted']['peak']:>17}{row['pace_ratio']:>8.2f}", flush=True)
    for part, measured in row["parts"].items():
        print(f"  {part:<13}{predicted_part(row['predicted'], part) / MIB:>11.0f}{'':>11}{measured / MIB:>11.0f}")
    return row


def predicted_part(predicted: dict[str, Any], part: str) -> int:
    """Return a part of the peak; the rest is what is neither weights nor the optimiser's."""
    parts = {name: value for name, value in predicted["parts"].items() if name != "framework"}
    named = ("weights", "optimiser", "teacher weights")
    return parts[part] if part != "rest" else sum(value for name, value in parts.items() if name not in named)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}")
    parser.add_argument("--check", action="store_true", help="exit 1 where a prediction is off by more than 15 %%")
    parser.add_argument("--save", action="store_true", help="write the results")
    for hidden in ("--way", "--setup", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(WAYS[options.way](options.setup, Path(options.folder))))
        return 0
    print(
        f"{'MiB':<15}{'predicted':>11}{'resident':>11}{'allocated':>11}{'error':>11}{'error':>11}{'peak':>17}{'pace':>8}"
    )
    from machine import described

    rows = []
    with tempfile.TemporaryDirectory(prefix="kdlm-plan-") as name:
        alone("inputs", "full", Path(name))
        for setup in QUICK if options.quick else SETUPS:
            rows.append(compared(setup, Path(name)))
            if options.save:
                results = {"machine": described() | {"threads": 1}, "gate": GATE, "setups": rows}
                (HERE / "results" / "plan_memory.json").write_text(json.dumps(results, indent=2) + "\n")
    worst = max(abs(error) for row in rows for error in row["errors"].values())
    print(f"largest error of the predicted peak, {len(rows)} set-ups: {worst:.1%}")
    return int(options.check and worst > GATE)


if __name__ == "__main__":
    sys.exit(main())
