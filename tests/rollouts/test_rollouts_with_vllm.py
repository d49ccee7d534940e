"""The engines `vllm` and `vllm_server` with a real vLLM: for `make test-vllm`, in `make test` there is no vLLM."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_laws
import httpx2
import pytest
import torch
from loopback import source
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3MoeConfig

from kdlm.recipe import load
from kdlm.rollouts import Sampling
from kdlm.rollouts.vllm_server import VLLMServerSection
from kdlm.train import train

PYTHON = os.environ.get("KDLM_VLLM_PYTHON")
ROOT = Path(__file__).parents[2]
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="KDLM_VLLM_PYTHON names no interpreter with vLLM: run `make test-vllm`"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder to run in, with models, in which this checkout is what `import kdlm` finds.

    Without PYTHONPATH: the checkout's folder `kernels` would hide the package of that name from transformers.
    """
    work = tmp_path_factory.mktemp("work")
    (work / "kdlm").symlink_to(ROOT / "kdlm")
    (work / "kdlm_kernels").symlink_to(ROOT / "kernels" / "kdlm_kernels")
    (work / "engine_laws.py").write_text(Path(engine_laws.__file__).read_text())
    tokenizer = AutoTokenizer.from_pretrained(source().location())
    shape: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": engine_laws.CONTEXT,
        "initializer_range": 0.15,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    configs = {
        "tied": LlamaConfig(**shape, tie_word_embeddings=True),
        "untied": LlamaConfig(**shape, tie_word_embeddings=False),
        "experts": Qwen3MoeConfig(**shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    return work


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | SETTINGS


class Server:
    """A vLLM started as docs/vllm_rollouts.md says, on a CPU, that can be killed and started again."""

    def __init__(self, work: Path, model: str, *without: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        page = (ROOT / "docs" / "vllm_rollouts.md").read_text()
        (command,) = re.findall(
            r"^```bash\n(VLLM_SERVER_DEV_MODE.*?api_server.*?)^```$", page, re.MULTILINE | re.DOTALL
        )
        command = command.replace("--port 8200", f"--port {port}").replace("--model STUDENT", f"--model {model}")
        for option in without:
            assert option in command
            command = command.replace(option, "")
        words = shlex.split(command.replace("\\\n", " "))
        self.environment = environment() | dict([words.pop(0).split("=")])
        assert words.pop(0) == "python"
        self.words = [str(PYTHON), *words, "--enforce-eager", "--dtype", "float32"]
        self.work, self.url, self.log = work, f"http://127.0.0.1:{port}", work / f"{port}.log"

    def start(self) -> "Server":
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                self.words, cwd=self.work, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def wait(self) -> "Server":
        end = time.monotonic() + 400
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx2.get(f"{self.url}/health", trust_env=False).is_success:
                    return self
            except httpx2.TransportError:
                time.sleep(0.5)
        raise AssertionError(f"vLLM does not come up:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(work: Path) -> Iterator[Server]:
    server = Server(work, "untied").start()
    try:
        yield server.wait()
    finally:
        server.kill()


def engine_for(url: str, student: Any, work: Path, **options: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(work / "tied")
    return VLLMServerSection(url=url, folder=work, **options).build(student, tokenizer, torch.device("cpu"))


def test_the_server_holds_the_newest_weights_after_every_step(server: Server, work: Path) -> None:
    for kind in ("untied", "lora"):
        student = engine_laws.student_of(kind, str(work))
        ends = [AutoTokenizer.from_pretrained(work / "tied").eos_token_id, engine_laws.frequent(student)]
        student.generation_config.eos_token_id = ends
        engine = engine_for(server.url, student, work)
        print(kind, json.dumps(engine_laws.all_of(engine, student, ends)))
        engine.close()
    assert not list(work.glob("kdlm-weights-*"))


@pytest.mark.parametrize("kind", engine_laws.KINDS)
def test_vllm_in_process_holds_the_newest_weights_after_every_step(work: Path, kind: str) -> None:
    command = [str(PYTHON), "engine_laws.py", kind, str(work)]
    done = subprocess.run(command, cwd=work, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    print(kind, done.stdout.splitlines()[-1])


def test_a_server_that_is_killed_and_started_again_loses_nothing(server: Server, work: Path, caplog: Any) -> None:
    student = engine_laws.student_of("untied", str(work))
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.05 * torch.randn_like(weight))  # not what the server starts with
    engine = engine_for(server.url, student, work, patience=300)
    sampling = Sampling(max_new_tokens=100, samples_per_prompt=8)
    began = time.monotonic()
    undisturbed = engine.generate(engine_laws.PROMPTS, sampling, 3)
    seconds = time.monotonic() - began
    engine.take(student, 1)
    caplog.clear()

    def kill() -> None:
        server.kill()
        server.start()

    killer = threading.Timer(seconds / 3, kill)
    killer.start()
    completions = engine.generate(engine_laws.PROMPTS, sampling, 3)
    killer.join()
    assert [one.ids for one in completions] == [one.ids for one in undisturbed]
    assert {one.version for one in completions} == {1}
    assert engine_laws.gap(student, completions, sampling) < engine_laws.BOUND
    assert any("has lost the student's weights" in line for line in caplog.messages)
    engine.close()


def test_a_tied_student_on_a_server_whose_log_probabilities_are_raw_is_refused(work: Path) -> None:
    server = Server(work, "tied", "--logprobs-mode processed_logprobs").start()
    try:
        server.wait()
        with pytest.raises(ValueError, match="add --logprobs-mode processed_logprobs"):
            engine_for(server.url, engine_laws.student_of("tied", str(work)), work)
    finally:
        server.kill()


NCCL = """
from typing import Any
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from kdlm.rollouts.weight_transfer import NCCLTransfer

class Sender:
    def __init__(self, where, client, source):
        assert isinstance(where, NCCLTrainerInitInfo) and where.world_size == 3 and where.is_sender
        self.source = source
        for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
            assert callable(getattr(client, name))
        sent.append("joined")
    def send_weights(self):
        said = [(one.name, one.dtype, one.shape) for one in self.source.metadata()]
        assert said == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.source]
        sent.append(len(said))
    def shutdown(self):
        sent.append("closed")

class Receiver:
    init_weight_transfer_engine = start_weight_update = update_weights = finish_weight_update = lambda self: None
    def world_size(self):
        return 2

sent: list[Any] = []
WeightTransferTrainerFactory.trainer_init = lambda where, *, client, source: Sender(where, client, source)
transfer = NCCLTransfer()
transfer.keep(AutoModelForCausalLM.from_pretrained("tied"))
for fresh in (True, False, True):
    transfer.send(Receiver(), fresh)
transfer.close()
assert sent == ["joined", 20, 20, "closed", "joined", 20, "closed"], sent
"""


def test_vllms_nccl_interface_is_the_one_that_is_called(work: Path) -> None:
    """No GPU is needed for this, and no NCCL: it tells that names and signatures are there, not that they work."""
    command = [str(PYTHON), "-c", NCCL]
    done = subprocess.run(command, cwd=work, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


RECIPE = """
student: {name: pretrained, path: tied}
teacher: {name: local, path: untied}
data: {train: [{path: prompts.jsonl}], max_length: 32}
method: {name: gkd, student_share: 1.0}
losses: [{name: reverse_kl}]
rollouts: {sampling: {max_new_tokens: 12, samples_per_prompt: 2}, engine: ENGINE}
training: {max_steps: 20, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 1, save_strategy: "no",
  use_cpu: true}
run_dir: RUN
"""


def written(work: Path, run: str, engine: str) -> str:
    rows = [{"prompt": f"def f{n}(x): return"} for n in range(16)]
    (work / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (work / f"{run}.yaml").write_text(RECIPE.replace("ENGINE", engine).replace("RUN", run))
    return f"{run}.yaml"


def steps(run: Path) -> list[dict[str, float]]:
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [log for log in logs if "loss" in log]


def held(run: Path) -> None:
    """Twenty steps, each on text of that step's weights, which the engine gave the student's own probabilities."""
    logs = steps(run)
    assert [log["step"] for log in logs] == list(range(1, 21))
    assert max(log["rollout/staleness"] for log in logs) == 0
    assert max(log["rollout/engine_gap"] for log in logs) < engine_laws.BOUND
    assert logs[-1]["reverse_kl"] < 0.8 * logs[0]["reverse_kl"]  # the weights have moved


def test_a_run_of_twenty_steps_with_vllm_in_process_draws_from_each_steps_weights(work: Path) -> None:
    recipe = written(work, "inside", "{name: vllm, max_model_len: 128}")
    command = [str(PYTHON), "-m", "kdlm", "train", recipe]
    done = subprocess.run(command, cwd=work, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    held(work / "inside")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killing_the_server_of_a_run_loses_no_step(work: Path, monkeypatch: Any, asynchronous: bool) -> None:
    monkeypatch.chdir(work)
    server = Server(work, "tied").start().wait()
    run = f"killed-{asynchronous}".lower()
    engine = f'{{name: vllm_server, url: "{server.url}", folder: {work}, patience: 300}}'
    recipe = load(written(work, run, engine), [f"rollouts.asynchronous={json.dumps(asynchronous)}"])

    def kill() -> None:
        while not (work / run / "metrics.jsonl").is_file() or len(steps(work / run)) < 5:
            time.sleep(0.01)
        server.kill()
        server.start()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        train(recipe)
        killer.join()
    finally:
        server.kill()
    if not asynchronous:
        held(work / run)
    else:
        assert [log["step"] for log in steps(work / run)] == list(range(1, 21))
        assert max(log["rollout/staleness"] for log in steps(work / run)) == 1
