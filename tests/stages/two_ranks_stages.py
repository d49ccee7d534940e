"""One rank of `test_two_ranks_go_through_the_stages_together`: `two_ranks_stages.py FOLDER FILE [WORD ...]`."""

import os
import sys

import torch

from kdlm import cli
from kdlm.recipe import Recipe
from kdlm.stages import running

torch.set_num_threads(1)
worlds: list[int] = []
train_one = running.train_one


def watched(recipe: Recipe, **options):
    folder = train_one(recipe, **options)
    worlds.append(torch.distributed.get_world_size())
    return folder


running.train_one = watched
assert cli.main(["train", *sys.argv[2:]]) == 0
assert set(worlds) == {2}, f"the stages ran on {worlds} ranks"
assert not torch.distributed.is_initialized()
sys.stdout.flush()
os._exit(0)  # on a busy machine a rank may abort in its teardown ("terminate called"), with all of its work done
