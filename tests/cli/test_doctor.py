"""`kdlm doctor`: says what is there, what is missing and what is broken, without the network."""

import json
import socket
from importlib.metadata import PackageNotFoundError

import pytest

from kdlm import doctor


def by_name() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.findings()}


def test_a_working_machine_exits_0_and_prints_json_for_programs(capsys):
    assert doctor.show(as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"group", "name", "state", "detail", "fix"} == set(found[0])
    assert {"machine", "core", "losses", "extra", "attention", "cache"} == {each["group"] for each in found}


def test_every_dependency_of_kdlm_is_looked_at():
    found = by_name()
    assert {"kdlm", "torch", "transformers", "datasets", "pydantic"} <= found.keys()


def test_it_never_opens_a_connection(monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError("doctor touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    doctor.findings()


def test_a_missing_extra_comes_with_the_line_that_installs_it(monkeypatch):
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    found = doctor._extra(next(package for package in doctor.EXTRAS if package.module == "bitsandbytes"))
    assert (found.state, found.fix) == ("missing", "pip install 'kdlm[quant]'")


def test_an_extra_that_does_not_import_is_broken_and_says_why(monkeypatch):
    def import_module(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nsecond line")

    monkeypatch.setattr(doctor, "version", lambda name: "1.0")
    monkeypatch.setattr(doctor, "import_module", import_module)
    found = doctor._extra(next(package for package in doctor.EXTRAS if package.module == "timm"))
    assert found.state == "broken"
    assert found.detail == "1.0 does not import: operator torchvision::nms does not exist"
    assert found.fix == "pip install --force-reinstall --no-deps timm"


@pytest.mark.parametrize("need", ["torch>=99", "nowhere-to-be-found"])
def test_a_broken_core_exits_1(monkeypatch, capsys, need):
    monkeypatch.setattr(doctor, "requires", lambda name: [need])
    assert doctor.show() == 1
    assert "broken" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_broken(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *args: False)
    found = by_name()["kdlm sandbox"]
    assert (found.state, found.fix) == ("broken", "export KDLM_CACHE=...")


def test_each_extra_of_the_package_has_a_line():
    from importlib.metadata import metadata

    said = " ".join(package.fix for package in doctor.EXTRAS)
    extras = set(metadata("kdlm").get_all("Provides-Extra") or []) - {"dev", "quickstart"}
    assert {extra for extra in extras if f"kdlm[{extra}]" not in said} == set()
