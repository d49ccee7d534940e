"""One rank of two that hold a teacher in shards and have different numbers of sequences for it to read."""

import sys
from pathlib import Path
from typing import Any

import torch
from tiny_models import rows, tiny_model
from torch import distributed as dist

from kdlm.data import Collator
from kdlm.losses import kept_rows, real_rows
from kdlm.sharding import held, sharded
from kdlm.teachers import AheadTeacher, LocalTeacher, local

CPU = torch.device("cpu")
LENGTHS = {0: [[5, 11, 3, 9], [17, 8, 2]], 1: [[4], [6, 7]]}


def load(device_map: Any = None) -> Any:
    model = tiny_model(2, hidden=24, vocab=64).double()
    return model if device_map is None else model.to("meta")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    teacher, plain = AheadTeacher(sharded(load, CPU), batch_size=2, computes_on=CPU), LocalTeacher(load())
    here, everything = held(teacher.model.parameters())
    assert here <= everything / 2 + 200, (here, everything)
    gathers, gathered = [], local.gathered
    local.gathered = lambda head: gathers.append(head) or gathered(head)
    batches = [Collator(0)(rows(lengths, seed=rank)) for lengths in LENGTHS[rank]]
    for _ in range(2):
        teacher.answer_ahead([(batch, kept_rows(batch["labels"])) for batch in batches])
        for number, batch in enumerate(batches):
            unforeseen = rank == 0 and number == 1  # on one rank alone
            asked = real_rows(batch) if unforeseen else kept_rows(batch["labels"])
            changed = batch | {"input_ids": batch["input_ids"].roll(rank, 1)}  # another text, on one rank alone
            for read in (batch, changed):
                ours, theirs = teacher(read, asked), plain(read, asked)
                torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-11, atol=1e-11)
                assert torch.equal(ours.head.weight, theirs.head.weight)
    assert 4 <= len(gathers) == teacher.turns, "the head is gathered once in a turn, not once a reading"
    (folder / f"done-{rank}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
