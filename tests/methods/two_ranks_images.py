"""One rank of `test_two_ranks_have_the_gradient_of_one_process`; rank 0 writes the gradients summed over ranks."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small_images import STEP, SmallCNN, gradients, image_rows, nets_of

from kdlm.methods import CRD, RKD

PAIR = ("embedding", "embedding")
METHODS = {
    "rkd": lambda: RKD(layer=PAIR),
    "crd": lambda: CRD(layer=PAIR, width=6),
    "crd_bank": lambda: CRD(layer=PAIR, width=6, memory=8, negatives=5),
}


def batch_gradients(name: str, part: slice) -> tuple[dict[str, torch.Tensor], ...]:
    """Return the gradients of a method on some of eight images, and what its bank holds after the step."""
    method = METHODS[name]()
    torch.manual_seed(11)
    nets = nets_of(method, SmallCNN(), SmallCNN(5, seed=1))
    rows = image_rows()
    found = gradients(method, nets, rows.select(range(8)[part]))
    method.stepped(STEP, {})
    return {key: tensor.contiguous() for key, tensor in found.items()}, method.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in METHODS:
        found, state = batch_gradients(name, slice(4 * rank, 4 * rank + 4))
        for tensor in found.values():
            dist.all_reduce(tensor)
        if rank == 0:
            save_file(found | state, folder / f"{name}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # on a busy machine a rank may abort in its teardown, with all of its work done
