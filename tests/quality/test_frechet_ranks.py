"""Statistics that two processes gathered are those of the whole set."""

import os
from pathlib import Path

import torch
from forks import CONTEXT

from kdlm.quality import FrechetStats, frechet_distance

FEATURES = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gather(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    stats = FrechetStats(3).add(FEATURES[:5] if rank == 0 else FEATURES[5:]).reduce()
    stats.save(Path(folder) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_ranks_that_add_up_have_the_statistics_of_the_whole_set(tmp_path):
    ranks = [CONTEXT.Process(target=gather, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        stats = FrechetStats.load(tmp_path / f"{rank}.safetensors")
        assert stats.count == 12
        torch.testing.assert_close(stats.covariance, FEATURES.T.cov())
        assert frechet_distance(stats, FEATURES) < 1e-9
