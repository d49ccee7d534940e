"""Memory that `kdlm plan` predicts beside memory that `kdlm train` takes, on a CPU, for six set-ups.

    python benchmarks/plan_memory.py [--quick] [--check]

Full fine-tuning, LoRA, eager logits (a dense signal, all rows at once), a cached teacher, long sequences, and activation
checkpointing. Models are made from configurations with random weights (37 M and 54 M weights, 32,000 tokens, fp32);
rows are bytes, of the greatest length but for one in four. Every run is `kdlm train` of the recipe, three steps, in a
process of its own, measured twice: by the peak of the resident set beyond what it was after a run of the same kind
with tiny models; and by torch's profiler, which sees every tensor that torch allocates on a CPU, as it is allocated and
freed. glibc is told to give blocks beyond 64 KiB back to the system at once (MALLOC_MMAP_THRESHOLD_), so that the
resident set is what is in use.

--check exits 1 unless the prediction is within 15 % of both peaks for every set-up; --quick measures the resident set
only, for two of them.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GATE = 0.15
VOCAB, STEPS = 32_000, 3
STUDENT = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6}
TEACHER = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
LONG = {"data.max_length": 2048, "training.per_device_train_batch_size": 1}
SETUPS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"student.lora": {"rank": 16}},
    "eager": {"method.chunk_rows": 4096, "teacher.signal": "dense"},
    "cached": {"teacher": "cached"},
    "long": LONG,
    "checkpointing": LONG | {"training.gradient_checkpointing": True},
}
QUICK = ("lora", "cached")
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""},
    **{"HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
}


def recipe_of(setup: str, folder: Path, sizes: dict[str, int] | None = None) -> Any:
    """Return the recipe of a set-up, all its files below `folder`; `sizes` stand in for those of both models."""
    from kdlm.recipe import Recipe

    data: dict[str, Any] = {
        "student": {"name": "fresh", "config_from": str(folder / "student"), "sizes": sizes or {}},
        "teacher": {"name": "local", "path": str(folder / ("tiny" if sizes else "teacher"))},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 256, "cache": str(folder / "cache")},
        "method": {"name": "logit_kd"},
        "losses": [{"name": "forward_kl"}],
        "training": {
            **{"max_steps": STEPS, "per_device_train_batch_size": 4, "use_cpu": True, "train_sampling_strategy": "sequential"},
            **{"logging_strategy": "no", "save_strategy": "no"},
        },
        "run_dir": str(folder / f"run-{setup}-{bool(sizes)}-{os.getpid()}"),
    }
    for key, value in SETUPS[setup].items():
        where, _, name = key.rpartition(".")
        (data[where] if where else data)[name] = value
    if data["teacher"] == "cached":
        model = {"name": "local", "path": str(folder / ("tiny" if sizes else "teacher"))}
        path = str(folder / ("cached-tiny" if sizes else "cached"))
        data["teacher"] = {"name": "cached", "path": path, "of": model, "format": {"name": "top_k", "k": 64}}
    return Recipe.model_validate(data)


def write_inputs(folder: Path) -> None:
    """Write a tokenizer of bytes, configurations, random teachers and rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate(["<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    for name, sizes in (("student", STUDENT), ("teacher", TEACHER), ("tiny", TINY)):
        fast.save_pretrained(folder / name)
        config = LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=4096, eos_token_id=0)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / name)
        if name != "student":
            LlamaForCausalLM(config).save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": "kdlm " * 1000}) + "\n" for _ in range(8))
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if sys.argv[2] == "inputs":
        write_inputs(folder)
    else:
        os.environ.update(ENVIRONMENT)
        import torch
        from kdlm.train import train
        sys.path.insert(0, str(HERE))
        from loss_memory_cpu import resident
        setup = sys.argv[2]
        if setup == "cached":
            from kdlm.capture import capture
            capture(recipe_of(setup, folder)); capture(recipe_of(setup, folder, TINY))
        t = time.time()
        train(recipe_of(setup, folder, TINY))
        gc.collect()
        before = resident("VmRSS")
        print("tiny", time.time() - t, before / 2**20)
        Path("/proc/self/clear_refs").write_text("5")
        t = time.time()
        train(recipe_of(setup, folder))
        print("took", time.time() - t, "peak", (resident("VmHWM") - before) / 2**20)
        from kdlm.plan.settings import Settings
        from kdlm.plan.step import trace
        t = time.time()
        r = recipe_of(setup, folder)
        l = trace(r, Settings.of(r, bf16=False))
        print(time.time() - t)
        for n,p in l.phases.items(): print(f"{n:20s} {p.peak/2**20:10.1f}", {k: round(v/2**20,1) for k,v in p.parts.items() if v}, f"{p.work.flops:.3g} {p.work.bytes:.3g} {p.work.calls}")
