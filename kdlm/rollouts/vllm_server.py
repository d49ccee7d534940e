"""The engine `vllm_server`: a vLLM server that somebody started, here or on another machine.

The server's weights carry a name that this engine gives them. A server that lost them (it was restarted) or got
others says another name, is sent the newest weights again, and what it wrote in between is thrown away: a server may
be killed at any moment, and no completion is lost or comes from other weights than it says.
"""

import logging
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from kdlm.remote import Passing, Remote, ServerUnavailable
from kdlm.rollouts.engine import Completion, Sampling
from kdlm.rollouts.vllm_requests import Ends, completions, end_ids, requests
from kdlm.rollouts.weight_transfer import FileTransfer, NCCLTransfer, Transfer, one_process, warn_untested
from kdlm.server_options import ServerOptions

logger = logging.getLogger(__name__)

HELP = "start the server as docs/vllm_rollouts.md says"
TOKEN_BYTES = 256
"""More than a server says of one token."""


class WeightSync:
    """vLLM's weight transfer over HTTP, one try a call, and what a server in developer mode says of its weights.

    Raises Passing where another try may help, ServerUnavailable where none will.
    """

    def __init__(self, remote: Remote):
        self.remote = remote

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begin; an update that was broken off, which keeps vLLM from beginning another, is ended first."""
        try:
            self._post("/start_weight_update")
        except ServerUnavailable as error:
            if "already active" not in str(error):
                raise
            self._post("/finish_weight_update")
            self._post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", None if weight_version is None else {"weight_version": weight_version})

    def name_weights(self, name: str) -> None:
        """Forget what was computed with the old weights, and give the new ones their name."""
        if not self._post("/reset_prefix_cache")["success"]:
            raise Passing("the server could not forget what its cache holds of the old weights")
        self._post("/update_weight_version", {"new_version": name})

    def weights_name(self) -> str:
        return self._get("/weight_info")["weight_version"]

    def world_size(self) -> int:
        return self._get("/get_world_size")["world_size"]

    def _get(self, path: str) -> Any:
        return self.remote.once("GET", path, limit=1 << 20)

    def _post(self, path: str, data: Any = None) -> Any:
        try:
            return self.remote.once("POST", path, limit=1 << 20, data=data)
        except Passing as failure:
            if "Worker failed" in str(failure):  # a server error to HTTP, but of what was asked: it will not pass
                raise ServerUnavailable(f"{self.remote.endpoint}{path}: {failure}; {HELP}") from None
            raise


class VLLMServerEngine:
    """Draws with a vLLM server, which is sent the student's weights.

    Args:
        remote: asks the server.
        transfer: how weights get there.
        end_ids: tokens that end a completion.

    Raises ServerUnavailable when the server stays away for longer than the patience, refuses, or answers nonsense, and
    ValueError when it was started otherwise than it has to be.
    """

    lives = False

    def __init__(self, remote: Remote, transfer: Transfer, end_ids: frozenset[int]):
        self.remote, self.transfer, self.end_ids = remote, transfer, end_ids
        self.sync = WeightSync(remote)
        self._run = f"kdlm-{uuid.uuid4().hex}"
        self._taken = self._version = 0
        self._model, self._ends = "", Ends(end_ids, 0)

    def take(self, student: Any, version: int) -> None:
        self.transfer.keep(student)
        self._taken, self._version = self._taken + 1, version
        patience = self.remote.patience()
        while True:
            try:
                return self._hold()
            except Passing as failure:
                patience.pause(failure)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        if not self._taken:
            raise RuntimeError("the engine has taken no weights yet: call take first")
        asked = requests(prompts, sampling, seed, self._ends)
        done: dict[int, list[Completion]] = {}
        patience, failing = self.remote.patience(), False
        while len(done) < len(prompts):
            try:
                self._hold()
                missing = [place for place in range(len(prompts)) if place not in done]
                calls = [partial(self._write, prompts[place], asked[place], place, sampling) for place in missing]
                written = dict(zip(missing, self.remote.ask(calls).result(), strict=True))
                if self.sync.weights_name() != self._name:
                    raise Passing("it lost the student's weights while it wrote: restarted, or sent others")
                whole = {place: made for place, made in written.items() if not isinstance(made, Passing)}
                done |= whole
                failing = failing and not whole
                for made in written.values():
                    if isinstance(made, Passing):
                        raise made
            except Passing as failure:
                if not failing:
                    patience.renew()  # the patience is with failures, not with a server that is long at work
                    failing = True
                patience.pause(failure)
        return [completion for place in range(len(prompts)) for completion in done[place]]

    def close(self) -> None:
        self.remote.close()
        self.transfer.close()

    @property
    def _name(self) -> str:
        return f"{self._run}-{self._taken}"

    def _hold(self) -> None:
        """Have the server hold the newest weights: look whether it does, and send them where not."""
        try:
            held = self.sync.weights_name()
        except ServerUnavailable as error:
            raise ServerUnavailable(f"{error}; is it a vLLM in developer mode? {HELP}") from error
        if held == self._name:
            return
        fresh = not held.startswith(self._run)
        if fresh:
            if self._model:
                logger.warning("%s: has lost the student's weights and is sent them again", self.remote.endpoint)
            self._meet()
        self.transfer.send(self.sync, fresh)
        if fresh:
            self._probe()
        self.sync.name_weights(self._name)

    def _meet(self) -> None:
        """Learn what a server is that this engine has not sent weights to."""
        remote = self.remote
        warn_untested(str(remote.once("GET", "/version", limit=1 << 16)["version"]))
        try:
            served = remote.once("GET", "/v1/models", limit=1 << 20)["data"][0]
            self._model, self._ends = served["id"], Ends(self.end_ids, int(served["max_model_len"]))
        except (KeyError, IndexError, TypeError) as error:
            raise ServerUnavailable(f"{remote.endpoint}/v1/models: not what vLLM answers ({error!r})") from error

    def _probe(self) -> None:
        """Raise ValueError where a server's log-probabilities are not those of what it draws from."""
        # The only token that may be drawn is certain, once what may be drawn counts; the model itself is not so sure.
        probe = {"prompt": [0], "max_tokens": 1, "n": 1, "temperature": 1.0, "allowed_token_ids": [0], "logprobs": 0}
        drawn = self._ask(probe | {"ignore_eos": True})
        if [len(log_probs) for _, log_probs in drawn] != [1] or abs(drawn[0][1][0]) > 1e-6:
            raise ValueError(
                f"{self.remote.endpoint}: the server gives log-probabilities before temperature, top-k and top-p, and "
                f"rollouts need them after: add --logprobs-mode processed_logprobs ({HELP})"
            )

    def _write(
        self, prompt: Sequence[int], asked: dict[str, Any], place: int, sampling: Sampling
    ) -> list[Completion] | Passing:
        """Ask once for the completions of a prompt; a failure that may pass is the answer, not raised."""
        try:
            samples = self._ask(asked | {"prompt": list(prompt)})
            return completions(samples, place, sampling, self._ends, self._version)
        except Passing as failure:
            return failure
        except ValueError as error:
            raise ServerUnavailable(f"{self.remote.endpoint}/v1/completions: {error}") from error

    def _ask(self, asked: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
        """Return ids and log-probabilities of every sample."""
        limit = 65536 + asked["n"] * asked["max_tokens"] * TOKEN_BYTES + len(asked["prompt"]) * TOKEN_BYTES
        data = {**asked, "model": self._model, "return_token_ids": True}
        answer = self.remote.once("POST", "/v1/completions", data=data, limit=limit)
        try:
            samples = sorted(answer["choices"], key=lambda choice: choice["index"])
            return [
                (
                    [int(one) for one in choice["token_ids"]],
                    [float(one) for one in choice["logprobs"]["token_logprobs"]],
                )
                for choice in samples
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerUnavailable(
                f"{self.remote.endpoint}/v1/completions: no token ids and log-probabilities as expected ({error!r})"
            ) from error


class VLLMServerSection(ServerOptions):
    """A vLLM server that runs beside the training, here or elsewhere: docs/vllm_rollouts.md says how to start it."""

    place: ClassVar[str] = "rollouts.engine"

    name: Literal["vllm_server"] = "vllm_server"
    timeout: float = Field(600.0, gt=0)
    """Seconds that one try may take: as long as the completions of one prompt take, with all others under way."""
    concurrency: int = Field(64, ge=1)
    """Prompts that are under way at once."""
    transfer: Literal["file", "nccl"] = "file"
    """How weights get there: through files in `folder`, or from GPU to GPU by vLLM's own NCCL backend."""
    folder: Path | None = None
    """For `file`: a folder that the server sees under the same path; by default where temporary files go."""

    def build(self, student: Any, tokenizer: Any, device: torch.device, *, copied: bool = True) -> VLLMServerEngine:
        """Reach the server and send it the student's weights: they are `copied` in any case.

        Raises as VLLMServerEngine does.
        """
        one_process()
        transfer = NCCLTransfer() if self.transfer == "nccl" else FileTransfer(self.folder)
        engine = VLLMServerEngine(self.remote(), transfer, end_ids(student, tokenizer))
        try:
            engine.take(student, 0)
        except BaseException:
            engine.close()
            raise
        return engine
