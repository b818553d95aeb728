"""What all tests share."""

import sys

import pytest
import torch

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
