"""One rank of `test_ranks_with_some_rows_each_have_the_masks_of_all_rows`, by `forks.on_ranks`."""

import os
import sys

import torch
import torch.distributed as dist

from kdlm.sparsity import SparsitySection
from kdlm.sparsity.masks import masks_of

SHAPES = {"a": (7, 12), "b": (2, 8), "c": (9, 4)}
"""Rows that ranks do not divide, and fewer than ranks."""
SECTIONS = [{"share": 0.9}, {"share": 0.9, "scope": "global"}, {"share": 0.9, "scope": "row"}, {"pattern": "1:4"}]

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def part(value: torch.Tensor) -> torch.Tensor:
        """As `torch.chunk` and FSDP2 cut rows; the last ranks may have none."""
        return dict(enumerate(value.chunk(ranks))).get(rank, value[:0])

    generator = torch.Generator().manual_seed(0)
    for section in (SparsitySection(**one) for one in SECTIONS):
        before: dict[str, torch.Tensor] = {}
        for share in (0.0, 0.2, 0.55, section.target):
            scores = {name: torch.randint(5, shape, generator=generator) / 7 for name, shape in SHAPES.items()}
            own = [{name: part(value) for name, value in whole.items()} for whole in (scores, before)]
            masks = masks_of(own[0], own[1], section, share, dist.group.WORLD)
            before = masks_of(scores, before, section, share)
            assert all(torch.equal(masks[name], part(mask)) for name, mask in before.items()), (section, share)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
