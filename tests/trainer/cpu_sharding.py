"""accelerate's own FSDP2 and tensor parallelism on gloo ranks of a CPU, for tests and benchmarks.

accelerate hands its FSDP plugin on where the ranks are GPUs (or other accelerators) and drops it without a word where
they are CPUs: `AcceleratorState.__init__` asks PartialState's `distributed_type`. Nothing behind that door needs a GPU,
so the ranks are called GPUs while it is open: what follows is accelerate's own `fsdp2_prepare_model`, its optimiser
switch and its checkpoints. Collectives stay gloo's. Models that are sliced over ranks it refuses at the same door.
"""

from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def shards_on_cpus() -> None:
    """Let accelerate shard on this process's CPU wherever it is asked for shards or slices, from now on."""
    begin = AcceleratorState.__init__

    def as_on_gpus(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        asked = fsdp_plugin is not None or options.get("parallelism_config") is not None
        if asked and PartialState().distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)

    AcceleratorState.__init__ = as_on_gpus
