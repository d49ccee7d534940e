"""Loading: from a folder that `save_pretrained` wrote, or from one of diffusers, to a denoiser."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kdlm.diffusion.denoiser import CONFIG, Denoiser
from kdlm.diffusion.diffusers_models import NULL, DiffusersDenoiser, check_kind
from kdlm.diffusion.small import MixtureDenoiser, ResidualDenoiser

PLACES = ("", "unet", "transformer")
"""Where a network lies in a folder of diffusers."""


def load_denoiser(
    path: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Denoiser:
    """Return a denoiser.

    Args:
        path: a folder that `save_pretrained` wrote; or of diffusers, a model with its `scheduler_config.json` or a
            whole pipeline, as a folder or hub id.
        subfolder: of the network in a pipeline; by default the first that is there of `unet` and `transformer`.
        revision: of a hub id.
        dtype: of the network's weights; float32 by default.
        **options: of `DiffusersDenoiser`; None is as if not given. `null_condition` may name a safetensors file.

    Raises ValueError, naming the path, when it holds no denoiser that can be read.
    """
    folder = _configurations(path, revision)
    made = _json(folder / CONFIG)
    given = {key: value for key, value in options.items() if value is not None}
    if made is None or made.get("kind") == "diffusers":
        stored = {key: value for key, value in (made or {}).items() if key != "kind" and value is not None}
        if stored.get("null_condition", "zeros") != "zeros":
            stored["null_condition"] = folder / stored["null_condition"]
        return _of_diffusers(path, folder, subfolder, revision, dtype or torch.float32, stored | given)
    if wrong := [*given, *(["subfolder"] if subfolder else []), *(["revision"] if revision else [])]:
        raise ValueError(f"{path}: `{wrong[0]}` is for models of diffusers, and this is none")
    denoiser = _built(made.pop("kind", None), made, folder)
    denoiser.load_weights(folder)
    return denoiser.to(dtype or torch.float32)


def look_for_denoiser(path: str | Path, subfolder: str | None = None, revision: str | None = None) -> str:
    """Return the kind of denoiser at a path without its weights. Raises ValueError as `load_denoiser` does."""
    folder = _configurations(path, revision)
    made = _json(folder / CONFIG)
    return str(made.get("kind")) if made and made.get("kind") != "diffusers" else _found(path, folder, subfolder)[0]


def _built(kind: str | None, made: dict[str, Any], folder: Path) -> Denoiser:
    if kind == "residual":
        return ResidualDenoiser(**made)
    if kind == "mixture":
        modes = made["modes"]
        return MixtureDenoiser(torch.zeros(modes, made["width"]), made["std"], torch.ones(modes) / modes)
    raise ValueError(f"{folder / CONFIG}: unknown kind {kind!r}")


def _of_diffusers(
    path: str | Path,
    folder: Path,
    subfolder: str | None,
    revision: str | None,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> Denoiser:
    kind, place, scheduler = _found(path, folder, subfolder)
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"{path}: {kind} needs diffusers: pip install 'kdlm[diffusion]'") from error
    name = scheduler["_class_name"]
    if not hasattr(diffusers, name):
        raise ValueError(f"{path}: this diffusers ({diffusers.__version__}) has no {name}")
    where = folder if Path(path).expanduser().is_dir() else path
    try:
        net = getattr(diffusers, kind).from_pretrained(where, subfolder=place, revision=revision, torch_dtype=dtype)
        if options.get("null_condition", "zeros") != "zeros":
            options = options | {"null_condition": load_file(options["null_condition"])}
        elif (_json(folder / "model_index.json") or {}).get("force_zeros_for_empty_prompt"):
            options = {"null_condition": "zeros"} | options
        return DiffusersDenoiser(net, getattr(diffusers, name).from_config(scheduler), **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _found(path: str | Path, folder: Path, subfolder: str | None) -> tuple[str, str, dict[str, Any]]:
    """Return the network's class, the subfolder it lies in, and the configuration of the scheduler beside it."""
    for place in PLACES if subfolder is None else (subfolder,):
        config = _json(folder / place / "config.json")
        if config is None or "_class_name" not in config:
            continue
        try:
            check_kind(config["_class_name"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for beside in (folder / "scheduler", folder / place):
            if scheduler := _json(beside / "scheduler_config.json"):
                return config["_class_name"], place, scheduler
        raise ValueError(f"{path}: no scheduler_config.json, in it or in `scheduler`, says what the network means")
    looked = "config.json, unet/config.json and transformer/config.json" if subfolder is None else subfolder
    raise ValueError(f"{path}: no denoiser here: looked for {CONFIG}, and of diffusers for {looked}")


def _configurations(path: str | Path, revision: str | None) -> Path:
    """Return a folder, or one with the configurations of a hub repository. Raises ValueError when there is none."""
    from huggingface_hub import snapshot_download

    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    try:
        wanted = ["*config.json", "*index.json", CONFIG, NULL]
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{path}: no such folder, nor can it be had from https://huggingface.co: {why}") from error


def _json(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
