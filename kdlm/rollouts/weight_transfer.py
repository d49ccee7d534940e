"""The one place that knows vLLM's weight transfer: which versions of it were run, and how weights get there.

vLLM's protocol is four calls (`init_weight_transfer_engine`, `start_weight_update`, `update_weights`,
`finish_weight_update`) to whatever is behind them: `vllm.LLM`, or a server in developer mode.
"""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file

from kdlm.rollouts.weights import named_weights

logger = logging.getLogger(__name__)

TESTED = ("0.30.0", "0.31.0", "0.32.0")
"""Versions of vLLM that the tests in tests/rollouts/test_rollouts_with_vllm.py were run with."""
BACKEND = "kdlm"
"""The name of kdlm's backend in vLLM, registered by `EXTENSION`."""
EXTENSION = "kdlm.rollouts.vllm_extension.Extension"
SHARD = 2 << 30
"""Bytes of weights in a file: what a transfer holds at once beside the two models, unless one tensor is larger."""


def warn_untested(version: str) -> None:
    """Say so where a version of vLLM is not one of those that were tested."""
    if version.partition("+")[0] not in TESTED:
        logger.warning("vLLM %s: weight transfer was tested with %s only", version, ", ".join(TESTED))


def one_process() -> None:
    """Raise ValueError where several processes train: each would send weights of its own."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError("rollouts.engine: vLLM takes weights from one training process; this run has several")


@runtime_checkable
class Receiver(Protocol):
    """vLLM's own protocol (`vllm.distributed.weight_transfer.VLLMWeightSyncClient`)."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


@runtime_checkable
class Transfer(Protocol):
    """A way from the student to a server."""

    def keep(self, student: Any) -> None:
        """Take note of the weights that are to be sent, as often as a server needs them."""
        ...

    def send(self, receiver: Receiver, fresh: bool) -> None:
        """Send what was kept; `fresh` to a server that nothing was sent to since it started."""
        ...

    def close(self) -> None: ...


class FileTransfer:
    """Through safetensors files in a folder that the server sees under the same path.

    Args:
        folder: where a folder of this run is made; by default where temporary files go.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = Path(tempfile.mkdtemp(prefix="kdlm-weights-", dir=folder))
        self.files: list[Path] = []
        self._number = 0

    def keep(self, student: Any) -> None:
        """Write the weights; those that were kept before are removed."""
        old, self.files = self.files, []
        shard: dict[str, torch.Tensor] = {}
        size = 0
        for name, tensor in named_weights(student):
            if shard and size + tensor.nbytes > SHARD:
                self._write(shard)
                shard, size = {}, 0
            shard[name] = tensor.contiguous()
            size += tensor.nbytes
        self._write(shard)
        for file in old:
            file.unlink()

    def _write(self, shard: dict[str, torch.Tensor]) -> None:
        self._number += 1
        self.files.append(self.folder / f"{self._number}.safetensors")
        save_file(shard, self.files[-1])

    def send(self, receiver: Receiver, fresh: bool) -> None:
        if fresh:
            receiver.init_weight_transfer_engine({})
        receiver.start_weight_update()
        for file in self.files:
            receiver.update_weights({"path": str(file)})
        receiver.finish_weight_update()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class NCCLTransfer:
    """From GPU to GPU by vLLM's own `nccl` backend; vLLM has to be installed where the student trains too.

    Nothing is written: what a restarted server is sent are the student's weights of that moment. This class has not
    been run on a GPU; vLLM's calls are checked against the tested versions.
    """

    def __init__(self) -> None:
        self.student: Any = None
        self._sender: Any = None

    def keep(self, student: Any) -> None:
        self.student = student

    def send(self, receiver: Receiver, fresh: bool) -> None:
        if fresh or self._sender is None:
            self.close()
            self._sender = self._joined(receiver)
        self._sender.send_weights()

    def _joined(self, receiver: Any) -> Any:
        """Meet the server's workers in a new group, in which this process has rank 0."""
        from vllm.distributed.weight_transfer import (  # pyright: ignore[reportMissingImports]
            ParamMeta,
            WeightSource,
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import (  # pyright: ignore[reportMissingImports]
            NCCLTrainerInitInfo,
        )
        from vllm.utils.network_utils import get_ip, get_open_port  # pyright: ignore[reportMissingImports]

        transfer = self

        class Source(WeightSource):
            def metadata(self) -> list[Any]:
                return [ParamMeta(name, one.dtype, tuple(one.shape)) for name, one in named_weights(transfer.student)]

            def __iter__(self) -> Any:
                return named_weights(transfer.student)

        where = NCCLTrainerInitInfo(get_ip(), get_open_port(), receiver.world_size() + 1, rank=0)
        return WeightTransferTrainerFactory.trainer_init(where, client=receiver, source=Source())

    def close(self) -> None:
        if self._sender is not None:
            self._sender.shutdown()
            self._sender = None
