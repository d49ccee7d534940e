"""Weights and optimiser of a checkpoint, whoever saved it: one process, DDP, FSDP2 in pieces or in one, or slices.

accelerate writes what FSDP2 holds as one file (FULL_STATE_DICT, here `consolidated`) or as each rank's pieces
(SHARDED_STATE_DICT, `sharded`: torch's distributed checkpoint), and reads each only as it was written; of layers that
are sliced over ranks nobody writes the optimiser, and here that is in pieces too. Any of them is read into any run,
whatever its ranks: names and shapes are those of whole weights in all three.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from kdlm import checkpoints
from kdlm.sharding import ranks

WEIGHTS, OPTIMIZER = "pytorch_model_fsdp", "optimizer"
"""Names that accelerate gives: `NAME_0/` in pieces, `NAME.bin` in one."""


def kind_of(folder: Path) -> Literal["plain", "consolidated", "sharded"]:
    """Return how a checkpoint holds its weights; `plain` is not FSDP2's."""
    if (folder / f"{WEIGHTS}_0").is_dir():
        return "sharded"
    return "consolidated" if (folder / f"{WEIGHTS}.bin").is_file() else "plain"


def load_weights(folder: Path, networks: nn.Module) -> None:
    """Read the weights of all roles that train. Every rank must ask.

    Raises ValueError where the checkpoint has none for a weight, or more than there is a place for.
    """
    kind = kind_of(folder)
    if kind == "sharded":
        state: dict[str, Any] = {"model": get_model_state_dict(networks)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder / f"{WEIGHTS}_0"), no_dist=ranks() == 1)
        set_model_state_dict(networks, state["model"])
        return
    state = {}
    if _reads(networks):
        opened = torch.load(folder / f"{WEIGHTS}.bin", weights_only=True) if kind == "consolidated" else _plain(folder)
        state = _complete(opened, networks, folder)
    set_model_state_dict(networks, state, options=_whole(networks))


def save_in_pieces(folder: Path, networks: nn.Module, optimizer: Any) -> None:
    """Write weights and optimiser of all roles that train, each rank its pieces. Every rank must ask."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # below accelerate's wrapper
    weights, state = get_model_state_dict(networks), get_optimizer_state_dict(networks, optimizer)
    dcp.save({"model": weights}, storage_writer=dcp.FileSystemWriter(folder / f"{WEIGHTS}_0"))
    dcp.save({"optimizer": state}, storage_writer=dcp.FileSystemWriter(folder / f"{OPTIMIZER}_0"))


def load_optimizer(folder: Path, networks: nn.Module, optimizer: Any) -> None:
    """Read the optimiser's state, of the roles that have one so far. Every rank must ask.

    Raises ValueError where the checkpoint has no settings for a group of parameters.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # below accelerate's wrapper
    kind = kind_of(folder)
    if kind == "sharded":
        state = _regrouped(_pieces(folder, networks, optimizer), networks, optimizer, folder)
        set_optimizer_state_dict(networks, optimizer, state, options=StateDictOptions(strict=False))
        return
    state = {}
    if _reads(networks):
        name = f"{OPTIMIZER}.bin" if kind == "consolidated" else f"{OPTIMIZER}.pt"
        state = torch.load(folder / name, map_location="cpu", weights_only=True)
        state = state if kind == "consolidated" else _by_name(state, networks, optimizer, folder)
        state = _regrouped(state, networks, optimizer, folder)
    set_optimizer_state_dict(networks, optimizer, state, options=_whole(networks, strict=False))
    _forget_others(networks, optimizer, [*state.get("state", {})])


def load_schedule(file: Path, schedule: Any) -> None:
    """Read a schedule's state, also of an optimiser whose groups were cut otherwise; `schedule` is as it begins."""
    saved, own = torch.load(file, weights_only=True), schedule.state_dict()
    for key, value in saved.items():
        if isinstance(value, list) and len(value) != len(own.get(key, value)):  # one for each group
            saved[key] = own[key]
    schedule.load_state_dict(saved)


def _pieces(folder: Path, networks: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return an optimiser's state, by names, and its groups as they were saved."""
    reader = dcp.FileSystemReader(folder / f"{OPTIMIZER}_0")
    saved = reader.read_metadata().state_dict_metadata
    state = get_optimizer_state_dict(networks, optimizer)["state"]
    # A role that has not moved yet has no state, and gets none.
    state = {k: v for k, v in state.items() if any(name.startswith(f"optimizer.state.{k}.") for name in saved)}
    groups: dict[int, dict[str, Any]] = {}
    for name in saved:
        if name.startswith(prefix := "optimizer.param_groups."):
            place, _, key = name.removeprefix(prefix).partition(".")
            groups.setdefault(int(place), {})[key] = None
    found: dict[str, Any] = {"state": state, "param_groups": [groups[place] for place in sorted(groups)]}
    dcp.load({"optimizer": found}, storage_reader=reader, no_dist=ranks() == 1)
    return found


def _regrouped(state: dict[str, Any], networks: nn.Module, optimizer: Any, folder: Path) -> dict[str, Any]:
    """Return a state by names whose groups are the optimiser's, each with the settings that its parameters had.

    The Trainer cuts a group in two where some of its weights are sliced over ranks and others are whole.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in networks.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    saved = {name: group for group in state["param_groups"] for name in group["params"]}
    groups = []
    for group in optimizer.param_groups:
        own = [name for parameter in group["params"] for name in names[id(parameter)] if name in saved]
        if not own:
            raise ValueError(f"{folder}: no optimiser for {names[id(group['params'][0])][0]}: it is of another run")
        groups.append({**saved[own[0]], "params": own})
    return {**state, "param_groups": groups}


def _forget_others(networks: nn.Module, optimizer: Any, known: list[str]) -> None:
    """Leave no state to a role that had not moved: torch makes a first one, of zeros that count as a step, for all."""
    if _cut(networks):
        torch.distributed.broadcast_object_list(told := [known], 0)
        known = told[0]
    moved = set(known)
    for name, parameter in networks.named_parameters():
        if name not in moved:
            optimizer.state.pop(parameter, None)


def whole_weights(networks: nn.Module, role: str) -> dict[str, Tensor] | None:
    """Return a role's weights in the host's memory of rank 0, and nothing elsewhere; None where nothing is sharded.

    Every rank must ask.
    """
    if not _cut(networks):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    prefix = f"role.{role}."
    state: dict[str, Any] = get_model_state_dict(networks, options=options)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _cut(networks: nn.Module) -> bool:
    """Whether each rank holds its part of some weights: FSDP2's shards, or slices."""
    return any(isinstance(parameter, DTensor) for parameter in networks.parameters())


def _reads(networks: nn.Module) -> bool:
    """Whether this rank opens a file of whole weights: where ranks hold parts, rank 0 does, and hands it round."""
    return not _cut(networks) or torch.distributed.get_rank() == 0


def _whole(networks: nn.Module, *, strict: bool = True) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=_cut(networks), strict=strict)


def _plain(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint that was saved without FSDP2, by the names that `Networks` has for them."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder}: it holds adapters alone, saved without FSDP: resume it without FSDP, or start anew"
        )
    found = {f"role.student.{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    for file in (folder / checkpoints.AUXILIARY).glob("*.safetensors"):
        found |= {f"role.{file.stem}.{k}": v for k, v in load_file(file).items()}
    return found


def _complete(state: dict[str, Tensor], networks: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return the networks' own entries, a tied weight that is stored once under all of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in networks.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for alike in names.values():
        if (known := next((name for name in alike if name in state), None)) is not None:
            state |= {name: state[known] for name in alike}
    wanted = networks.state_dict().keys()
    if missing := [name for name in wanted if name not in state]:
        raise ValueError(f"{folder}: no weights for {missing[0]} (and {len(missing) - 1} more): it is of another run")
    if foreign := [k for k in state if k not in wanted and k.startswith("role.student.")]:
        raise ValueError(
            f"{folder}: no place for its {foreign[0]} (and {len(foreign) - 1} more): it is of another model"
        )
    return {name: state[name] for name in wanted}


def _by_name(state: dict[str, Any], networks: nn.Module, optimizer: Any, folder: Path) -> dict[str, Any]:
    """Return an optimiser's state by the parameters' names instead of their places; groups may be cut in two here."""
    names = {id(parameter): name for name, parameter in networks.named_parameters()}
    place = {name: at for at, name in enumerate(names.values())}
    ours = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    order: list[str] = []
    for group in state["param_groups"]:
        own = ours.pop(0) if ours else []
        while len(own) < len(group["params"]) and ours:
            own = sorted(own + ours.pop(0), key=place.__getitem__)
        if len(own) != len(group["params"]):
            raise ValueError(
                f"{folder}: its optimiser has a group of {len(group['params'])} weights, where this run "
                f"has {len(own)}: it is of another run"
            )
        order += own
    groups = [{**group, "params": [order[at] for at in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[at]: values for at, values in state["state"].items()}, "param_groups": groups}
