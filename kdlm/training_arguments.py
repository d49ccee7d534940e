"""`training:` of a recipe: the typed mirror of transformers' TrainingArguments, made from its own fields.

Names, types, defaults and help are those of the installed transformers, so a key means what its documentation says.
Left out is what kdlm decides itself (`OWNED`). `DEFAULTS` lists the few defaults that differ.
"""

import dataclasses
import re
import types
import typing
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from pydantic import Field, create_model
from transformers import TrainingArguments

from kdlm.section import Section

OWNED = frozenset(
    {
        *(
            "output_dir",
            "seed",
            "data_seed",
            "resume_from_checkpoint",
            "local_rank",
            "do_train",
            "do_eval",
            "do_predict",
        ),
        *("remove_unused_columns", "label_names", "length_column_name", "include_for_metrics", "batch_eval_metrics"),
        *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("disable_tqdm", "label_smoothing_factor", "ignore_data_skip", "parallelism_config"),
        *("ddp_find_unused_parameters", "average_tokens_across_devices", "save_only_model", "use_liger_kernel"),
        *("liger_kernel_config", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision", "overwrite_output_dir", "logging_dir"),
    }
)
"""Fields that a recipe cannot set: kdlm sets them, or its losses, data and checkpoints would not listen to them."""

DEFAULTS: dict[str, tuple[Any, str]] = {
    "report_to": ("none", "By default none: metrics are in the run folder's `metrics.jsonl`."),
    "logging_steps": (10, "By default 10."),
    "bf16": (None, "By default on where the GPU computes in bfloat16 and fp16 is off; never on by itself on a CPU."),
}
"""Where kdlm's default differs from transformers': the value, and what to say about it."""

RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Names that newer transformers warn about and older ones need: recipes may use either."""

TYPES = {"fsdp": bool | str | None}
"""Types of fields whose annotation in transformers, made for the command line, leaves out what they take: true."""

POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
NOT_NEGATIVE = (
    *("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "num_train_epochs", "adam_epsilon"),
    *("dataloader_num_workers", "eval_delay"),
)
SHARES = ("adam_beta1", "adam_beta2")


class TrainingSection(Section):
    """Arguments of the Hugging Face Trainer."""

    def build(self, kind: type[TrainingArguments] | None = None, **owned: Any) -> TrainingArguments:
        """Return the TrainingArguments, with what kdlm decides (`output_dir`, `seed`, ...) in `owned`.

        A `kind` of them, TRL's, has the same defaults here, whatever its own are: a key means one thing in all recipes.
        """
        chosen = {name: value for name, (value, _) in DEFAULTS.items()} | self.model_dump(exclude_unset=True)
        if chosen["bf16"] is None:
            chosen["bf16"] = not chosen.get("fp16") and not chosen.get("use_cpu") and _bf16_on_gpu()
        for old, new in RENAMED.items():
            if old in chosen and any(field.name == new for field in dataclasses.fields(TrainingArguments)):
                chosen[new] = chosen.pop(old)
        if kind is None:
            return TrainingArguments(**chosen | owned)
        theirs = {field.name: field.default for field in dataclasses.fields(kind)}
        plain: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
        kept = {name: default for name, default in plain.items() if default != theirs[name]}
        return kind(**kept | chosen | owned)


def _bf16_on_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _type_of(annotation: Any) -> Any:
    """Return the annotation as YAML can hold it: an enum is a choice of its values."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return Literal[tuple(member.value for member in annotation)]
    if get_origin(annotation) is list:
        return list[_type_of(get_args(annotation)[0])]
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    members = get_args(annotation)
    if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        members = tuple(member for member in members if member is not str)  # the enum says which words there are
    return Union[tuple(_type_of(member) for member in members)]  # noqa: UP007  made at run time


def _limits(name: str) -> dict[str, Any]:
    if name in POSITIVE:
        return {"ge": 1}
    if name in NOT_NEGATIVE:
        return {"ge": 0}
    return {"ge": 0, "lt": 1} if name in SHARES else {}


def _fields() -> dict[str, Any]:
    annotations = typing.get_type_hints(TrainingArguments)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(TrainingArguments):
        if field.name in OWNED or not field.init:
            continue
        annotation = TYPES.get(field.name) or _type_of(annotations[field.name])
        default = field.default if field.default is not dataclasses.MISSING else None
        description = re.sub(r"\s+", " ", str(field.metadata.get("help", ""))).strip()
        if field.name in DEFAULTS:
            default, said = DEFAULTS[field.name]
            annotation, description = annotation | None, f"{description} {said}"
        default = default.value if isinstance(default, Enum) else default
        fields[field.name] = (annotation, Field(default, description=description, **_limits(field.name)))
    return fields


if TYPE_CHECKING:

    class Training(TrainingSection): ...

else:
    Training = create_model(
        "Training",
        __base__=TrainingSection,
        __doc__="Arguments of the Hugging Face Trainer; what is left out keeps its default.",
        __module__=__name__,
        **_fields(),
    )
