"""The configurations of recipes/accelerate are what accelerate's own parser takes."""

import argparse
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_key(path: Path) -> None:
    """Its parser raises for a key that it does not know."""
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"


@pytest.mark.parametrize("path", [path for path in CONFIGS if "fsdp2" in path.stem], ids=lambda path: path.stem)
def test_the_launcher_takes_it_as_fsdp2(path: Path) -> None:
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "-m", "kdlm", "train", "recipe.yaml"])
    args, _, _ = _validate_launch_command(parsed)
    assert isinstance(args, argparse.Namespace)
    assert args.use_fsdp and int(args.fsdp_version) == 2
    assert args.fsdp_state_dict_type == "SHARDED_STATE_DICT"
    assert str(args.fsdp_offload_params).lower() == str("offload" in path.stem).lower()


def test_every_configuration_has_a_row_in_the_readme() -> None:
    readme = (FOLDER.parent / "README.md").read_text()
    assert CONFIGS and all(f"accelerate/{path.name}" in readme for path in CONFIGS)
