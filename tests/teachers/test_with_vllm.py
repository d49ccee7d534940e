"""The teachers `openai` and `vllm` with a real vLLM: `make test-vllm` runs this, in `make test` there is no vLLM."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from loopback import source
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdlm.capture import capture
from kdlm.losses import kept_rows
from kdlm.recipe import load
from kdlm.remote import Endpoint, Remote, ServerUnavailable
from kdlm.signal import IGNORE_INDEX
from kdlm.store import Store
from kdlm.teachers import LocalTeacher, OpenAITeacher, ServedTeacher
from kdlm.train import train

PYTHON = os.environ.get("KDLM_VLLM_PYTHON")
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}
MOST = 32
"""The server's own limit of log-probabilities per position."""

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="KDLM_VLLM_PYTHON names no interpreter with vLLM: run `make test-vllm`"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model whose heads are of a size that vLLM has on a CPU; the sandbox's tiny ones are too narrow."""
    made = tmp_path_factory.mktemp("model")
    config = AutoConfig.from_pretrained(source().location())
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim, config.initializer_range = 32, 0.15
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    AutoTokenizer.from_pretrained(source().location()).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Without PYTHONPATH: the checkout's folder `kernels` would hide the package of that name from transformers.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | SETTINGS
    options = ["--enforce-eager", "--dtype", "float32", "--max-logprobs", str(MOST), "--served-model-name", "tiny"]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    work = tmp_path_factory.mktemp("vllm")
    with open(work / "log", "w") as log:
        process = subprocess.Popen(
            [*command, *options], cwd=work, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, work / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(health: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 400
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx2.get(health, trust_env=False).is_success:
                return
        except httpx2.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"vLLM does not come up:\n{log.read_text()[-4000:]}")


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 512, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, 0] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}


@pytest.mark.parametrize("k", [1, 20, MOST])
def test_vllm_gives_the_top_k_of_the_model(folder: Path, url: str, k: int) -> None:
    batch = batch_of(40, 2, 17)
    rows = kept_rows(batch["labels"])
    teacher: Any = OpenAITeacher(Remote(Endpoint(url)), "tiny", k, 512)
    signal = teacher(batch | {"teacher": teacher.prefetch(batch)}, rows)
    teacher.close()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = rows.select(logits.log_softmax(-1))
    torch.testing.assert_close(signal.log_probs, log_probs.topk(k).values, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(signal.log_probs, log_probs.gather(-1, signal.ids), atol=2e-4, rtol=1e-4)
    assert all(len(set(ids)) == k for ids in signal.ids.tolist())


def test_more_than_the_servers_limit_is_refused_at_once_with_its_reason(url: str) -> None:
    teacher = OpenAITeacher(Remote(Endpoint(url, patience=60)), "tiny", MOST + 1, 512)
    began = time.monotonic()
    with pytest.raises(ServerUnavailable, match="refused, 400"):
        teacher(batch_of(5), kept_rows(batch_of(5)["labels"]))
    assert time.monotonic() - began < 10
    teacher.close()


def test_a_model_that_is_not_served_is_said_with_those_that_are(url: str) -> None:
    remote = Remote(Endpoint(url))
    with pytest.raises(ValueError, match="serves tiny, not large"):
        OpenAITeacher(remote, "large", 5, 512)
    remote.close()


def test_a_student_learns_from_vllm(folder: Path, url: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
student: {{name: sandbox, model: code-student-tiny}}
teacher: {{name: openai, url: "{url}", model: tiny, of: {{name: pretrained, path: {folder}}}, k: {MOST}}}
data: {{train: [{{path: "sandbox:code/train", limit: 4}}], max_length: 32, eval_rows: 1}}
method: {{name: logit_kd}}
losses: [{{name: forward_kl}}]
training: {{max_steps: 20, per_device_train_batch_size: 4, learning_rate: 0.02, logging_steps: 20, use_cpu: true,
           save_strategy: "no", eval_strategy: steps, eval_steps: 10}}
run_dir: {tmp_path / "run"}
""")
    run = train(load(recipe))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [line["eval_kl_to_teacher"] for line in lines if "eval_kl_to_teacher" in line]
    assert curve[-1] < curve[0]


CAPTURE = """
student: {name: sandbox, model: code-student-tiny}
teacher:
  name: cached
  path: {FOLDER}/local
  of: {name: local, path: {MODEL}}
  format: {FORMAT}
data: {train: [{path: "sandbox:code/train", limit: 2}], max_length: 32}
method: {name: logit_kd}
losses: [{name: forward_kl}]
training: {max_steps: 5, per_device_train_batch_size: 4, use_cpu: true, save_strategy: "no"}
run_dir: {FOLDER}/run
"""
FORMATS = {"top_k": "{name: top_k, k: 24}", "hidden": "{name: hidden, dtype: float32}"}


@pytest.mark.parametrize("signal", FORMATS)
def test_a_capture_by_vllm_is_that_of_transformers_and_teaches(folder: Path, tmp_path: Path, signal: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = CAPTURE.replace("{FOLDER}", str(tmp_path)).replace("{MODEL}", str(folder))
    recipe.write_text(text.replace("{FORMAT}", FORMATS[signal]))
    model = f"of: {{name: pretrained, path: {folder}, dtype: float32}}, signal: {signal}, k: 24"
    of = f"teacher.of={{name: vllm, {model}, options: {{enforce_eager: true, max_model_len: 64}}}}"
    there = [of, f"teacher.path={tmp_path / 'vllm'}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | SETTINGS
    command = [str(PYTHON), "-m", "kdlm", "capture", str(recipe), *there]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ours, theirs = Store(capture(load(recipe))), Store(tmp_path / "vllm")
    assert ours.rows == theirs.rows > 1000
    for mine, other in zip(ours.shards, theirs.shards, strict=True):
        for place in range(0, len(mine), 7):
            a, b = (ours.format.unpack([ours.format.raw(*shard.columns(place))]) for shard in (mine, other))
            if signal == "hidden":
                torch.testing.assert_close(a["hidden"], b["hidden"], rtol=1e-3, atol=1e-4)
            else:
                assert (a["ids"] == b["ids"]).float().mean() > 0.99  # ties at the end of the list may fall either way
                torch.testing.assert_close(a["log_tail"], b["log_tail"], rtol=1e-3, atol=1e-3)
    run = train(load(recipe, there))
    assert (run / "student" / "model.safetensors").is_file()


def test_kdlm_serve_runs_a_model_in_vllm(folder: Path, tmp_path: Path) -> None:
    """Hidden states over HTTP from vLLM equal those of transformers, in several requests at once."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | SETTINGS
    options = ["--engine-option", "enforce_eager=true", "--engine-option", "max_model_len=128"]
    command = [str(PYTHON), "-m", "kdlm", "serve", "--model", str(folder), "--dtype", "float32", "--engine", "vllm"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*command, *options, "--port", str(port)],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "log")
        teacher: Any = ServedTeacher(Remote(Endpoint(f"http://127.0.0.1:{port}")))
        local = LocalTeacher(AutoModelForCausalLM.from_pretrained(folder))
        for lengths in ((40, 2, 17), (128,), (5, 5, 5, 5, 90, 3)):
            batch = batch_of(*lengths)
            rows = kept_rows(batch["labels"])
            theirs, ours = teacher(batch | {"teacher": teacher.prefetch(batch)}, rows), local(batch, rows)
            torch.testing.assert_close(theirs.hidden, ours.hidden, rtol=1e-3, atol=1e-4)
            assert torch.equal(theirs.head.weight, ours.head.weight)
        teacher.close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
