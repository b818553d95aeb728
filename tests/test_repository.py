"""The repository: what is generated is up to date, what is versioned agrees, and a clone stays small."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml

import pizoo
from pizoo import checkpoint, overview, zoo
from pizoo.files import CheckpointError, read_json

REPOSITORY = Path(__file__).parent.parent
CARDS = REPOSITORY / "model_cards"
LARGEST_CLONE = 500 * 1000**2  # half of it the weights of 15 nets and kernels, half what git keeps of them


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git clone, or an old git: {done.stderr.strip()}")
    return done.stdout


def test_the_table_of_the_zoo_says_what_the_cards_record():
    """Out of date? ``pizoo overview`` writes it."""
    assert (CARDS / overview.PAGE).read_text() == overview.overview(CARDS)
    readme = (REPOSITORY / "README.md").read_text()
    assert readme == overview.with_table(readme, CARDS, "model_cards/")


def test_the_table_has_a_row_for_every_entry_with_its_recorded_mean_and_links_that_lead_somewhere():
    rows = [row.split(" | ") for row in overview.table(CARDS, "model_cards/").splitlines()[2:]]
    assert [re.search(r"`(\w+)`", row[0])[1] for row in rows] == zoo.list_entries()
    for entry, row in zip(zoo.list_entries(), rows, strict=True):
        assert (REPOSITORY / re.search(r"\]\((.+)\)", row[0])[1]).is_file()
        if zoo.has_weights(entry):
            assert f"{read_json(zoo.card(entry) / checkpoint.RESULTS)['mean_accuracy']:.2f}" in row[4]


def test_the_tables_verdicts_are_those_of_verify():
    told = dict(re.findall(r"^\| \[`(\w+)`\](?:[^|]*\|){5} ([^|]*) \|", overview.table(CARDS), re.MULTILINE))
    assert told.keys() == set(zoo.list_entries())
    for entry in zoo.list_entries():
        verdict = pizoo.verify(entry, quick=True).reproduction
        assert told[entry] == ("–" if verdict.startswith("no ") else verdict)


def test_a_text_without_a_place_for_the_table_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# Nothing\n")
    with pytest.raises(CheckpointError, match="has no place for the table"):
        overview.write_overview(CARDS, tmp_path / "README.md")


def test_links_of_the_readme_lead_to_files_that_exist():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (REPOSITORY / name).read_text()):
            assert (REPOSITORY / link).exists(), f"{name}: {link}"


def test_citation_and_changes_are_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == pizoo.__version__ and citation["cff-version"] == "1.2.0"
    assert f"## {pizoo.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
    assert f'version = "{pizoo.__version__}"' in (REPOSITORY / "pyproject.toml").read_text()


def test_a_clone_stays_small():
    """What is checked out, and the pack of every object that leads to it; as loose objects they may take more here."""
    checked_out = sum((REPOSITORY / path).stat().st_size for path in git("ls-files", "-z").split("\0") if path)
    # Large files are not worth the search for what they share.
    pack = ("git", "-c", "core.bigFileThreshold=200k", "pack-objects", "--revs", "--stdout", "-q")
    sent = subprocess.run(pack, cwd=REPOSITORY, input=b"HEAD\n", capture_output=True, check=True).stdout
    assert checked_out + len(sent) < LARGEST_CLONE


def test_git_leaves_what_has_a_recorded_sha256_as_it_is():
    for path in (
        "model_cards/digits_mu/model.safetensors",
        "model_cards/digits_mu/config.json",
        "pizoo/assets/digits.npz",
    ):
        assert git("check-attr", "text", path).strip().endswith("text: unset")


def test_no_file_of_the_clone_is_a_git_lfs_pointer():
    for path in git("ls-files", "-z").split("\0"):
        if path:
            assert not (REPOSITORY / path).read_bytes().startswith(b"version https://git-lfs"), path


# Examples


def example(monkeypatch, name: str, *arguments: object) -> dict:
    """An example's globals, with its arguments on the command line."""
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    return runpy.run_path(str(REPOSITORY / "examples" / name))


@pytest.mark.parametrize("name", ["finite_width.py", "minimal.py", "moving_kernel.py"])
def test_every_example_says_what_it_does_and_takes(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        example(monkeypatch, name, "--help").get("main", lambda: None)()
    assert not stopped.value.code and f"usage: {name}" in capsys.readouterr().out


def test_an_example_draws_beside_itself_wherever_it_is_run_unless_told_where(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for out, told in ((REPOSITORY / "examples" / "finite_width.png", ()), (Path("mine.png"), ("--out", "mine.png"))):
        found = example(monkeypatch, "finite_width.py", "--steps", 5, "--widths", 40, *told)
        drawn = []
        monkeypatch.setitem(
            found["main"].__globals__, "plot", lambda *arguments, drawn=drawn: drawn.append(arguments[-1])
        )
        found["main"]()
        assert drawn == [out]
