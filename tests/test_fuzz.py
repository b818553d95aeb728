"""Whatever happens to a checkpoint's files, loading gives the net to the bit or a message; ``benchmarks/fuzz.py`` does more."""

from __future__ import annotations

import sys
from collections import Counter

import corrupt
import pytest
from memory import forget_peak, peak

from pizoo import config, files, segments

CASES = 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return corrupt.subjects(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def fuzzed(made, tmp_path_factory):
    """Kind, checkpoint and outcome of every case, and the memory all took."""
    linux = sys.platform.startswith("linux")
    before = linux and forget_peak()
    cases = corrupt.fuzz(CASES, made, tmp_path_factory.mktemp("fuzz"))
    return [(kind, subject.name, outcome) for kind, subject, outcome in cases], linux and peak() - before


def test_corrupted_checkpoints_are_refused_or_load_as_they_were_and_nothing_else_happens(fuzzed):
    outcomes, _ = fuzzed
    assert [case for case in outcomes if case[2] not in corrupt.GOOD] == []
    kinds = Counter(kind for kind, _, _ in outcomes)
    assert kinds.keys() == corrupt.KINDS.keys() and min(kinds.values()) >= CASES // len(kinds)
    assert len({name for _, name, _ in outcomes}) == len(corrupt.CARDS) + len(corrupt.TRAININGS)


def test_without_a_digest_that_fits_no_other_net_is_ever_loaded(fuzzed):
    for kind, name, outcome in fuzzed[0]:
        if kind not in (*corrupt.ANOTHER_NET, "signed manifest"):
            assert outcome in (corrupt.REFUSED, corrupt.SAME, corrupt.RECORDS), (kind, name, outcome)
    refused = Counter(kind for kind, _, outcome in fuzzed[0] if outcome == corrupt.REFUSED)
    assert all(
        refused[kind] for kind in corrupt.KINDS if kind not in ("reshaped json", "edited results", "signed alphas")
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is counted as Linux does")
def test_no_size_in_a_file_is_allocated_before_the_numbers_are_seen(fuzzed):
    assert 0 < fuzzed[1] < 300e6, fuzzed[1]


@pytest.mark.parametrize("check", ["check_file", "config_digest", "_check_order"])
def test_the_fuzzing_notices_when_a_check_is_left_out(made, check, tmp_path, monkeypatch):
    """A control: without any one of these, some corruption loads another net, and the fuzzing says so."""
    left_out = {
        "check_file": lambda path, digest=None: path,
        "config_digest": lambda config: config["pizoo"].get("sha256"),
        "_check_order": lambda segments: None,
    }
    for module in (config, files, segments):
        if hasattr(module, check):
            monkeypatch.setattr(module, check, left_out[check])
    outcomes = (outcome for _, _, outcome in corrupt.fuzz(2000, made, tmp_path))
    assert any(outcome not in corrupt.GOOD for outcome in outcomes)
