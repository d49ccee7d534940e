"""The writer `vllm` with a real vLLM, on a CPU: for `make test-vllm`, in `make test` there is no vLLM."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from loopback import source
from transformers import LlamaConfig, LlamaForCausalLM

PYTHON = os.environ.get("KDLM_VLLM_PYTHON")
ROOT = Path(__file__).parents[2]
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="KDLM_VLLM_PYTHON names no interpreter with vLLM: run `make test-vllm`"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


def model(work: Path) -> Path:
    """Write a model whose heads vLLM has a CPU kernel for; return its folder."""
    if not (folder := work / "model").exists():
        tokenizer = source().tokenizer()
        config = LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=128, initializer_range=0.15,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def made(work: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    """Run a pipeline where this checkout is what `import kdlm` finds; return its rows.

    Without PYTHONPATH: the checkout's folder `kernels` would hide the package of that name from transformers.
    """
    options = {"enforce_eager": True, "max_num_seqs": 16}
    writer = {"name": "vllm", "path": str(model(work)), "dtype": "float32", "batch_size": 8, "options": options}
    prompts = [{"prompt": f"def add_{n}(a, b):\n"} for n in range(10)]
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    sampling = {"temperature": 0.8, "max_new_tokens": 12, "samples_per_prompt": 2}
    plan = {
        "sources": [{"path": "prompts.jsonl"}],
        "writers": {"it": writer},
        "steps": [{"name": "generate", "by": "it", "sampling": sampling, "log_probs": True, **changes}],
        "output": name,
    }
    (work / f"{name}.yaml").write_text(json.dumps(plan))
    for room in ("kdlm", "kdlm_kernels"):
        if not (work / room).exists():
            (work / room).symlink_to(ROOT / ("kdlm" if room == "kdlm" else "kernels/kdlm_kernels"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | SETTINGS
    command = [str(PYTHON), "-m", "kdlm", "generate", f"{name}.yaml"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return pyarrow.parquet.read_table(work / name / "rows.parquet").to_pylist()


def test_a_run_that_lost_answers_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    whole = made(tmp_path, "whole")
    assert len(whole) == 20
    assert len({row["seed"] for row in whole}) == 20
    assert all(row["tokens"] == len(row["log_probs"]) <= 12 for row in whole)
    assert all(row["log_prob"] < 0 and row["revision"] for row in whole)
    (lines,) = (tmp_path / "whole").glob("answers/*/lines.jsonl")
    torn = tmp_path / "torn" / lines.relative_to(tmp_path / "whole")
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:11]) + b'{"key": "b')
    assert made(tmp_path, "torn") == whole


def test_the_most_probable_text_needs_no_log_probabilities(tmp_path: Path) -> None:
    rows = made(tmp_path, "greedy", sampling={"temperature": 0, "max_new_tokens": 4}, log_probs=False)
    assert len(rows) == 10
    assert all(row["log_probs"] is None for row in rows)
