"""CutSequences: the part of a `DistillTrainer` that trains on sequences cut over ranks (accelerate's `sp_size`).

The ranks of a group read the same rows of data, and each trains on its part of every sequence: DeepSpeed's Ulysses
(arXiv 2309.14509; ALST, 2506.13996) gives attention all positions of some of the heads in place of all heads of some of
the positions. Teachers read whole sequences. A method sees whole sequences too, in which the rows of other ranks have
no labels: labels are shifted before anything is cut, and every row is counted once.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from transformers import Trainer

from kdlm import deepspeed
from kdlm.data import Collator, Prefetched
from kdlm.losses import kept_rows
from kdlm.methods import Method
from kdlm.models import Part, PartReader, Predictor, refuse_parts
from kdlm.networks import Networks
from kdlm.parallelism import parallelism_of, parts_of
from kdlm.sharding import ranks
from kdlm.teachers import CachedTeacher, LocalTeacher

READ = frozenset({"labels", "teacher", "teacher.layers"})
"""What methods may need of cut sequences."""


class CutSequences(Trainer):
    """Has each rank train on its part of every sequence, where accelerate was asked for `sp_size` of them."""

    networks: Networks
    part = Part(0, 1)
    """This rank's part of every sequence."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        config: Any = self.accelerator.parallelism_config
        if (size := parts_of(config)) == 1:
            return
        self.part = Part(self.args.process_index % size, size)
        config.sp_handler.sp_attn_implementation = self.networks.config._attn_implementation
        self.networks.views["student"] = PartReader(self.networks.views["student"], self.part)
        self.loss_is_scaled_for_ga = True  # as ever here; the Trainer believes otherwise where sequences are cut
        # DeepSpeed's own loader cuts what teachers read too, and hands out the batches of a group one after another.
        self.accelerator.deepspeed_ulysses_dl_adapter = lambda loader, model: loader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, in which ranks exchange what attention needs of other parts."""
        attention = self.networks.config._attn_implementation
        with deepspeed.sharing_attention(attention) if self.part.of > 1 else nullcontext():
            return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """As the Trainer's, with the same rows for all ranks of a group."""
        loader: Any = super().get_train_dataloader()
        if self.part.of > 1:
            loader.batch_sampler.num_processes //= self.part.of
            loader.batch_sampler.process_index //= self.part.of
        return loader

    def get_sp_size(self) -> int:
        """Return 1: a loader is as long as it says, whatever DeepSpeed's own does to it."""
        return 1

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return how many rows an optimiser step has."""
        return super().get_total_train_batch_size(args) // self.part.of

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any) -> Any:
        """As the Trainer's, of batches in which this rank's rows alone have labels."""
        return super().get_batch_samples(epoch_iterator if self.part.of == 1 else map(self._own, epoch_iterator), *args)

    def _own(self, batch: dict[str, Any]) -> dict[str, Any]:
        own = batch | {"labels": self.part.labels(batch["labels"])}
        if "teacher" in batch:  # what was read of a capture, for all kept rows
            begin, size = self.part.span(length := batch["labels"].shape[1])
            position = kept_rows(batch["labels"]).index % length
            mine = ((position >= begin) & (position < begin + size)).cpu()
            own["teacher"] = {name: values[mine.to(values.device)] for name, values in batch["teacher"].items()}
        return own

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As the Trainer's, with a look at what DeepSpeed has made of the ranks."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.part.of > 1:
            from deepspeed.utils import groups

            group = groups._get_sequence_parallel_group()
            found = Part(dist.get_rank(group), dist.get_world_size(group))
            if found != self.part:
                raise ValueError(
                    f"parallelism_config.sp_size: DeepSpeed gives this rank {found}, and it has {self.part}"
                )
        return prepared


def refuse_beside_parts(args: Any, networks: Any, teacher: Any, method: Method, collator: Any) -> None:
    """Raise ValueError, where each sequence is cut over ranks, for what cannot be right of its parts."""
    config = parallelism_of(args)
    if (size := parts_of(config)) == 1:
        return
    if config.total_size != ranks():
        raise ValueError(
            f"parallelism_config: sp_size {size} and the other sizes make {config.total_size} ranks, and there are "
            f"{ranks()}: say dp_replicate_size: {max(1, ranks() // size)}"
        )
    if args.deepspeed_plugin and not args.deepspeed_plugin.hf_ds_config.get_value(
        "zero_optimization.reduce_scatter", True
    ):
        raise ValueError(
            "DeepSpeed: with zero_optimization.reduce_scatter: false, gradients of ranks that share sequences would be "
            "added up or averaged by their size: leave it out"
        )
    student, name = networks.views["student"], type(method).__name__
    layout = collator.collate if isinstance(collator, Prefetched) else collator
    cannot = {
        f"{name} looks at sequences as wholes, or never said that it does not (`by_rows`)": not method.by_rows,
        f"{name} needs {', '.join(sorted(method.needs - READ))}": not method.needs <= READ,
        f"a {type(teacher).__name__} was never asked for parts: take a resident local or a cached teacher": (
            teacher is not None and not _reads_whole(teacher)
        ),
        "batches have to be padded on the right: data.packing: none, and kdlm.data.Collator(layout='padded')": (
            type(layout) is not Collator or layout.layout != "padded"
        ),
        "the student is no causal language model that reads text alone": (
            type(student) is not Predictor or student.mask_id is not None or not student.causal
        ),
    }
    for why, wrong in cannot.items():
        if wrong:
            raise ValueError(f"sequence parallelism (sp_size): {why}")
    refuse_parts(student.module, size)


def _reads_whole(teacher: Any) -> bool:
    """Whether a teacher answers for some rows of whole sequences, on every rank by itself."""
    return isinstance(teacher, CachedTeacher) or (type(teacher) is LocalTeacher and not teacher.in_shards)
