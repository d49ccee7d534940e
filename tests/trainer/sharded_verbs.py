"""One rank of `kdlm train` in shards, by `forks.on_ranks`: `sharded_verbs.py FOLDER RECIPE [--resume]`."""

import sys
from pathlib import Path

import torch
from cpu_sharding import shards_on_cpus
from sharded_runs import finish

from kdlm.recipe import load
from kdlm.train import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    shards_on_cpus()
    train(load(Path(sys.argv[2])), resume="--resume" in sys.argv)
    finish()
