"""`kdlm generate` against a vLLM server on a CPU: killed five times, and beside a client that does nothing but ask.

    KDLM_VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/generate_throughput.py [--quick] [--check] [--save]

A small Llama with random weights and the sandbox's tokenizer, in float32, continues 2,000 beginnings of programs four
times each, by sampling with a seed of its own for every completion. (The sandbox's own models have heads that vLLM has
no CPU kernel for.) So small a model is quick, and a client's own time weighs the more.

Killed: one run is left alone; another one, in a folder of its own, is ended by SIGKILL at five moments drawn at random
and started again each time. Both must have the same completions: the same prompts and numbers, and the same texts. What
the killed one asked twice is said.

Throughput: the same requests by `kdlm generate`, from reading its sources to the parquet file on disk, and by a bare
client (httpx with as many threads, which throws the answers away), in turns on the same server, each with prompts that
the server has seen. The figure is the median over the turns of the client's seconds over kdlm's in the same turn.

--check exits 1 when the sets differ or the figure is below 0.9. --quick takes 200 prompts and 2 kills. --save writes
benchmarks/results/generate_throughput.json. CI has no vLLM and does not run this: `KDLM_VLLM_PYTHON` names a Python
that has one (`make test-vllm` makes it).
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import pyarrow.parquet
import torch
from machine import described
from transformers import LlamaConfig, LlamaForCausalLM

from kdlm.curation import Pipeline, run
from kdlm.curation.asking import Request, seed_of
from kdlm.curation.generate import prompt_id
from kdlm.models import named
from kdlm.rollouts import Sampling

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER, SAMPLES, CONCURRENCY, GATE = "sandbox:code-student-tiny", 4, 32, 0.9
SAMPLING = Sampling(temperature=0.8, max_new_tokens=16)
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}


def model(folder: Path) -> Path:
    """Write the model that is served; return its folder."""
    tokenizer = named(TOKENIZER).tokenizer()
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@contextlib.contextmanager
def vllm(folder: Path) -> Iterator[str]:
    """Serve the model; yields the url."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | SETTINGS
    command = [os.environ["KDLM_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model(folder)), "--served-model-name", "tiny", "--port", str(port)]
    command += ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "64", "--disable-uvicorn-access-log"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 400
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success:
                    break
            time.sleep(0.5)
        else:
            sys.exit(f"vLLM does not come up:\n{(folder / 'log').read_text()[-4000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def prompts(count: int) -> list[str]:
    """Return beginnings of programs, all different."""
    drawn = random.Random(0)
    names = ["total", "count", "find", "merge", "split", "left", "right", "value"]
    made = [f"def {a}_{b}_{n}({c}):\n    " for n in range(count) for a, b, c in [drawn.sample(names, 3)]]
    return made


def plan(folder: Path, url: str, name: str, asked: list[str]) -> Path:
    """Write a pipeline; return its file."""
    source = folder / f"prompts-{len(asked)}.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    writer = {"name": "openai", "url": url, "model": "tiny", "concurrency": CONCURRENCY}
    sampling = SAMPLING.model_dump(mode="json") | {"samples_per_prompt": SAMPLES}
    said = {
        "sources": [{"path": str(source)}],
        "writers": {"it": writer},
        "steps": [{"name": "generate", "by": "it", "sampling": sampling}],
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(said))
    return path


def lines(folder: Path) -> int:
    """Return how many answers a run has kept."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("answers/*/lines.jsonl"))


def texts(folder: Path) -> dict[tuple[str, int], str]:
    """Return what a run made, by prompt and number."""
    columns = ["prompt_id", "sample", "completion"]
    rows = pyarrow.parquet.read_table(folder / "rows.parquet", columns=columns).to_pylist()
    found = {(row["prompt_id"], row["sample"]): row["completion"] for row in rows}
    assert len(found) == len(rows), "a completion is there twice"
    return found


def requests_served(url: str) -> int:
    """Return how many requests the server has finished."""
    page = httpx2.get(f"{url}/metrics", trust_env=False).text
    return round(
        sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("vllm:request_success_total"))
    )


def generate(path: Path) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "kdlm", "generate", str(path)]
    with open(path.with_name("generate.log"), "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def killed(folder: Path, url: str, asked: list[str], kills: int) -> dict[str, Any]:
    """Run once alone and once with kills; return how the two compare."""
    count = len(asked) * SAMPLES
    before = requests_served(url)
    whole = generate(plan(folder, url, "whole", asked))
    if whole.wait():
        sys.exit((folder / "generate.log").read_text()[-3000:])
    alone = requests_served(url) - before
    path, out = plan(folder, url, "broken", asked), folder / "broken"
    moments = sorted(random.Random(1).sample(range(count // 50, count - count // 50), kills))
    before, at = requests_served(url), []
    for moment in moments:
        process = generate(path)
        while lines(out) < moment and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        at.append(lines(out))
    last = generate(path)
    assert last.wait() == 0
    first, second = texts(folder / "whole"), texts(out)
    differ = sum(first[key] != second[key] for key in first.keys() & second.keys())
    return {
        "completions": count,
        "kills_after": at,
        "same_keys": first.keys() == second.keys() and len(first) == count,
        "texts_that_differ": differ,
        "requests_alone": alone,
        "requests_killed": requests_served(url) - before,
    }


def bare(url: str, asked: list[str]) -> float:
    """Send the requests that kdlm sends and throw the answers away; return the seconds."""
    bodies = []
    for prompt in asked:
        key = prompt_id(prompt)
        for slot in range(SAMPLES):
            seed = seed_of(0, Request(key, slot), SAMPLING)
            data = {"model": "tiny", "prompt": prompt, "n": 1, "temperature": SAMPLING.temperature, "top_p": 1.0}
            bodies.append({**data, "max_tokens": SAMPLING.max_new_tokens, "seed": seed})
    limits = httpx2.Limits(max_connections=CONCURRENCY)
    with (
        httpx2.Client(base_url=url, trust_env=False, timeout=600, limits=limits) as client,
        ThreadPoolExecutor(CONCURRENCY) as pool,
    ):
        began = time.perf_counter()
        answers = list(pool.map(lambda body: client.post("/v1/completions", json=body).status_code, bodies))
        seconds = time.perf_counter() - began
    assert set(answers) == {200}
    return seconds


def in_turns(folder: Path, url: str, asked: list[str], turns: int) -> dict[str, Any]:
    """Let kdlm and the bare client take turns; return the seconds of each."""
    took: dict[str, list[float]] = {"kdlm": [], "bare": []}
    bare(url, asked)  # the server has seen the prompts
    for turn in range(turns):
        for who in ("kdlm", "bare") if turn % 2 else ("bare", "kdlm"):
            if who == "bare":
                took[who].append(bare(url, asked))
                continue
            pipeline = Pipeline.model_validate(json.loads(plan(folder, url, f"turn-{turn}", asked).read_text()))
            began = time.perf_counter()
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                run(pipeline, lambda line: None)
            took[who].append(time.perf_counter() - began)
    ratios = [theirs / ours for theirs, ours in zip(took["bare"], took["kdlm"], strict=True)]
    pace = {f"{who}_requests_per_second": len(asked) * SAMPLES / median(each) for who, each in took.items()}
    return {"requests": len(asked) * SAMPLES, "seconds": took, **pace, "ratio": median(ratios), "ratios": ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 prompts, 2 kills, 3 turns: a smoke test")
    parser.add_argument("--check", action="store_true", help="exit 1 when sets differ or the figure is below 0.9")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/generate_throughput.json")
    args = parser.parse_args()
    if not os.environ.get("KDLM_VLLM_PYTHON"):
        parser.error("KDLM_VLLM_PYTHON names no interpreter with vLLM: see `make test-vllm`")
    count, kills, turns = (200, 2, 3) if args.quick else (2000, 5, 7)
    with tempfile.TemporaryDirectory() as name, vllm(folder := Path(name)) as url:
        broken = killed(folder, url, prompts(count), kills)
        print(json.dumps(broken))
        speed = in_turns(folder, url, prompts(count)[: count // 4], turns)
        print(json.dumps(speed))
    found = {"machine": described(), "concurrency": CONCURRENCY, "killed": broken, "throughput": speed}
    if args.save:
        path = ROOT / "benchmarks" / "results" / "generate_throughput.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
    same = broken["same_keys"] and not broken["texts_that_differ"]
    print(f"the killed run has {'the same' if same else 'NOT the same'} completions")
    print(f"{speed['ratio']:.3f}")
    return int(args.check and not (same and speed["ratio"] >= GATE))


if __name__ == "__main__":
    sys.exit(main())
