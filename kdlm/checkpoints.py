"""Checkpoints that are whole or not there: each is sealed by a manifest, written last, that names every file."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import safetensors.torch
import xxhash
from torch import Tensor, nn

from kdlm.disk import digest_of_file, flush, write_text

MANIFEST = "manifest.json"
AUXILIARY = "kdlm"
NAME = re.compile(r"checkpoint-(\d+)")


def save_auxiliary(folder: Path, networks: dict[str, dict[str, Tensor]], states: dict[str, dict[str, Tensor]]) -> None:
    """Write the weights beside the student, and the states of what has one by its name, into a checkpoint."""
    if networks or any(states.values()):
        (folder / AUXILIARY).mkdir(
            parents=True, exist_ok=True
        )  # ranks with shards leave the folder to the first writer
    for name, weights in networks.items():  # hub's function knows tied weights
        pattern = f"{name}{{suffix}}.safetensors"
        huggingface_hub.save_torch_state_dict(
            weights, folder / AUXILIARY, filename_pattern=pattern, max_shard_size=2**62
        )
    for name, state in states.items():
        if state:
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
            safetensors.torch.save_file(tensors, folder / AUXILIARY / f"{name}_state.safetensors")


def load_auxiliary(folder: Path, networks: dict[str, nn.Module]) -> None:
    """Read the networks back that `save_auxiliary` wrote. Raises ValueError when one is missing."""
    for name, module in networks.items():
        path = folder / AUXILIARY / f"{name}.safetensors"
        if not path.is_file():
            raise ValueError(f"{folder}: no weights for the role {name!r}: this checkpoint is of another method")
        safetensors.torch.load_model(module, str(path))


def save_module(module: nn.Module, folder: Path) -> None:
    """Write the weights of a student that does not know how to save itself."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_model(module, str(folder / "model.safetensors"))


def load_module(module: nn.Module, folder: Path) -> None:
    """Read back what `save_module` wrote."""
    safetensors.torch.load_model(module, str(folder / "model.safetensors"))


def fingerprint_of(module: nn.Module) -> str:
    """Return a hash of names, shapes and the first numbers of every weight: it tells two checkpoints apart."""
    digest = xxhash.xxh3_128()
    for name, weight in module.state_dict().items():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        first = weight.detach().flatten()[:256].cpu()
        digest.update((first.float() if first.is_floating_point() else first).numpy().tobytes())
    return digest.hexdigest()


def load_state(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the state that was saved under `name`; empty where there was none."""
    path = folder / AUXILIARY / f"{name}_state.safetensors"
    return safetensors.torch.load_file(path) if path.is_file() else {}


def seal(folder: Path) -> None:
    """Flush every file of a checkpoint to disk, then write the manifest that makes it one."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "xxh3": digest_of_file(p)} for p in files}
    flush(folder)
    write_text(folder / MANIFEST, json.dumps(entries, indent=1))


def clear(folder: Path) -> None:
    """Delete what lies where a checkpoint is to be written: a run that was killed there may have had more ranks."""
    if folder.is_dir():
        (folder / MANIFEST).unlink(missing_ok=True)  # from here on it is no checkpoint
        shutil.rmtree(folder)


def verify(folder: Path) -> None:
    """Raise ValueError naming the file when a checkpoint is not what was sealed."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: not a finished checkpoint (no {MANIFEST}); a run was stopped while writing it")
    for name, entry in json.loads((folder / MANIFEST).read_text()).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or digest_of_file(path) != entry["xxh3"]:
            raise ValueError(
                f"{path}: damaged or missing (checksum of {MANIFEST} differs); resume from another checkpoint"
            )


def finished(run: Path) -> list[Path]:
    """Return the sealed checkpoints of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Return the optimiser step of a checkpoint. Raises ValueError when the folder's name does not say it."""
    if match := NAME.fullmatch(folder.name):
        return int(match[1])
    raise ValueError(f"{folder}: not a checkpoint, those are called checkpoint-STEP")


def prune(run: Path, keep: int | None, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one. A kill in between leaves only whole ones."""
    if not keep:
        return
    spared = {p for p in finished(run)[-keep:]} | ({Path(best)} if best else set())
    for folder in finished(run):
        if folder not in spared:
            clear(folder)
