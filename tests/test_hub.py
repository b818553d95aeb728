"""The Hub: published and loaded by everybody's names, and what goes wrong is said and mended."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from hub_faults import ADDRESS, ENTRY, FAULTS, REPO, undergo

import pizoo
from pizoo import zoo

SHIPPED = [entry for entry in zoo.list_entries() if zoo.has_weights(entry)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_told_and_loses_nothing_and_the_next_try_succeeds(fault, scene):
    outcome = undergo(fault, scene)
    assert outcome.lost == []
    if fault.says is None:
        assert outcome.said is None
    else:
        assert outcome.said and re.search(fault.says, outcome.said), outcome.said
        assert len(outcome.said.splitlines()) == 1
