"""What a user installs: two import names, one version, one command, and rooms that import downwards only."""

import configparser
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import kdlm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DATA_ROOMS = ["benchmarks", "docs", "eval", "examples", "recipes", "tests"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        ROOT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"kdlm", "kdlm_kernels", f"kdlm-{kdlm.__version__}.dist-info"}


def test_the_wheel_holds_every_module_of_the_tree(wheel):
    written = {str(path.relative_to(ROOT)) for path in (ROOT / "kdlm").rglob("*.py")}
    written |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == written


def test_the_wheel_holds_the_script_and_style_of_the_report(wheel):
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "kdlm").rglob("*") if path.suffix in (".js", ".css")}
    assert files and files <= set(wheel.namelist())


def test_the_wheel_has_the_kdlm_command_and_the_licence(wheel):
    info = f"kdlm-{kdlm.__version__}.dist-info"
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"kdlm": "kdlm.cli:main"}
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()


def test_the_version_is_written_once():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    assert version("kdlm") == kdlm.__version__


@pytest.mark.parametrize("room", [*DATA_ROOMS, "kernels"])
def test_a_room_that_is_not_a_package_cannot_be_imported_as_one(room):
    """A root package called `kernels`, say, would hide the one of Hugging Face and break transformers."""
    inside = (ROOT / room).rglob("__init__.py") if room != "kernels" else (ROOT / room).glob("__init__.py")
    assert list(inside) == []


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for path in (ROOT / "kdlm").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_rooms_import_downwards_only():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_dependency_has_a_lower_bound_and_every_constraint_an_exact_one():
    extras = PROJECT["project"]["optional-dependencies"].values()
    named = [entry for entries in [PROJECT["project"]["dependencies"], *extras] for entry in entries]
    assert [entry for entry in named if ">=" not in entry and not entry.startswith("kdlm[")] == []
    pins = [
        line for name in ("constraints.txt", "constraints-cpu.txt") for line in (ROOT / name).read_text().split("\n")
    ]
    assert [line for line in pins if line and line[0] not in "#-" and not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_a_machine_without_a_gpu_is_told_which_torch_to_take():
    pins = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    assert "-c constraints.txt" in pins
    assert any(line.startswith("torch==") for line in pins)
    assert any(line.startswith("triton==") for line in pins)


def test_the_dockerfile_does_not_run_as_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1] not in ("0", "root")
    assert lines.index('ENTRYPOINT ["kdlm"]') > lines.index(f"USER {users[-1]}")


def test_the_first_screen_of_the_readme_shows_the_two_commands():
    first_screen = (ROOT / "README.md").read_text().splitlines()[:30]
    assert "make quickstart" in first_screen
    assert "make test" in first_screen
