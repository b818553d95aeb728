"""What all tests share."""

import importlib.util
import sys
from pathlib import Path

import loopback_hub  # isort: skip (before anything imports huggingface_hub: no test talks to the real Hub)

import pytest
import torch
from hub_faults import Scene

from pizoo import cli

# The nets here are tiny: threads cost more in waiting for each other than they save, most of all on cores that others use.
torch.set_num_threads(1)


class Outcome:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def pizoo_command(monkeypatch, capsys):
    """Runs ``pizoo ARGUMENTS...`` in this process, as the installed command does."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pizoo", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def load_benchmark():
    """Gives a file of ``benchmarks/`` as a module, by its name."""

    def load(name: str):
        path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def loopback(tmp_path_factory):
    """The one loopback Hub of this run."""
    hub = loopback_hub.LoopbackHub(tmp_path_factory.mktemp("hub"), loopback_hub.LISTENING)
    yield hub
    hub.close()


@pytest.fixture
def scene(loopback, tmp_path):
    """An empty Hub, an empty cache, an account."""
    with Scene(loopback, tmp_path) as made:
        yield made
