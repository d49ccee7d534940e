"""What runs inside vLLM's workers: the receiving end of kdlm's weight transfer.

Importing this registers the backend `kdlm`, which takes tensors as they are where the engine runs in the trainer's
process, and from a safetensors file where it does not. vLLM imports it when it is started with
`--worker-extension-cls kdlm.rollouts.vllm_extension.Extension`; nothing else in kdlm does.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from vllm.distributed.weight_transfer import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferEngineFactory,
)
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
    ParallelLMHead,
)
from vllm.model_executor.model_loader.reload import (  # pyright: ignore[reportMissingImports]
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


@dataclass
class Nothing(WeightTransferInitInfo):
    """There is nothing to agree on beforehand."""


@dataclass
class Weights(WeightTransferUpdateInfo):
    """Some of the weights: a file's, or the tensors themselves."""

    path: str | None = None
    tensors: Iterable[tuple[str, Tensor]] | None = None


class KdlmTransfer(WeightTransferEngine[Nothing, Weights]):
    """Loads weights under the checkpoint's names, layer by layer, as vLLM loads a checkpoint."""

    init_info_cls = Nothing
    update_info_cls = Weights

    def init_transfer_engine(self, init_info: Nothing) -> None: ...

    def start_weight_update(self) -> None:
        self.missing = {_plain(name) for name, _ in self.model.named_parameters()}
        if self.device.type == "cpu":
            for layer in self.model.modules():  # experts are packed anew only where there is no kernel yet
                if getattr(getattr(layer, "quant_method", None), "moe_kernel", None) is not None:
                    layer.quant_method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Weights) -> None:
        tensors: Any = update_info.tensors
        if update_info.path is not None:
            tensors = load_file(update_info.path).items()
        loaded = self.model.load_weights(tensors)
        # None: a model that does not say.
        self.missing -= self.missing if loaded is None else {_plain(name) for name in loaded}

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.missing and self.model_config.quantization is None:  # as vLLM holds it with a checkpoint
            raise ValueError(f"weights of the model that did not come: {', '.join(sorted(self.missing)[:5])} ...")
        for layer in self.model.modules():
            # On a CPU vLLM computes with a packed copy of a weight, which it makes anew only where the weight arrives
            # under the layer's own name: a head that is tied to the embedding would keep the old one.
            if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None: ...


def _plain(name: str) -> str:
    """Return a parameter's name without the module that holds a layer's experts: some versions leave it out."""
    return name.replace(".routed_experts.", ".")


class Extension:
    """Adds nothing to a worker: that vLLM looks for it is what imports this module."""


WeightTransferEngineFactory.register_engine("kdlm", KdlmTransfer)
