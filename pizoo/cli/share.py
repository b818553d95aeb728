"""Commands that hand on: cards and the table of the zoo, the Hub, checkpoints of the paper's code, data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pizoo.cli.console import err, percent, print_table, say
from pizoo.cli.options import Data, Device, Entries, matching


def card(
    entries: Entries,
    cards: Annotated[Path, typer.Option(help="Folder of the cards.")] = Path("model_cards"),
) -> None:
    """Write cards again from what they record and what their recipes say by now; nothing is trained or measured."""
    from pizoo.cards import refresh
    from pizoo.recipes import list_recipes, load_recipe
    from pizoo.zoo import TUNED

    _check_in_clone(cards)
    for entry in matching(entries, list_recipes()):
        refresh(cards / entry, load_recipe(entry))
        if (cards / entry / TUNED).is_dir():
            refresh(cards / entry / TUNED, load_recipe(entry))
        say(f"{entry}: card in {cards / entry}")


def overview(
    cards: Annotated[Path, typer.Option(help="Folder of the cards.")] = Path("model_cards"),
    readme: Annotated[Path, typer.Option(help="Where the table is to stand, too.")] = Path("README.md"),
) -> None:
    """Write the table of the whole zoo again, after cards have changed: into the folder of the cards and the README."""
    from pizoo.overview import write_overview

    _check_in_clone(cards, readme)
    for path in write_overview(cards, readme):
        say(f"wrote {path}")


def publish(
    entry: Annotated[str, typer.Argument(help="An entry's name, or the folder of a checkpoint.")],
    repo_id: Annotated[str | None, typer.Option(help="OWNER/NAME (the entry's own, of $PIZOO_HUB).")] = None,
    full: Annotated[Path | None, typer.Option(help="Folder of a training to publish too, every epoch of it.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to publish to (main).")] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is made now, make it private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent, byte by byte.")] = False,
) -> None:
    """Put an entry or a checkpoint on the Hugging Face Hub, in one commit; what is there already is not sent."""
    from pizoo.upload import publish as run

    done = run(entry, repo_id, full=full, dry_run=dry_run, private=private or None, revision=revision)
    rows = [
        (upload.path, f"{upload.size:,}", upload.sha256[:16], "there already" if upload.present else "to send")
        for upload in done.uploads
    ]
    print_table(("file", "bytes", "SHA-256", "on the Hub" if dry_run else "before"), rows, caption=None)
    told = f"{done.bytes_to_send:,} bytes in {sum(not upload.present for upload in done.uploads)} files"
    commit = "" if dry_run else f", commit {done.commit}"
    say(f"{'would send' if dry_run else 'sent'} {told} to {done.address}{commit}", highlight=False)


def convert(
    file: Annotated[Path, typer.Argument(help="What the paper's code saved.", exists=True, dir_okay=False)],
    entry: Annotated[str, typer.Option(help="What it is a net of: an entry's name, or the folder of a checkpoint.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder to be made (runs/FILE).")] = None,
    data: Data = None,
    device: Device = None,
) -> None:
    """Convert a checkpoint of the paper's code, of which nothing is executed, and measure it where its data are."""
    from pizoo.convert import compare
    from pizoo.convert import convert as run

    with err.status(f"converting {file}"):
        done = run(file, entry, out_dir or Path("runs") / file.stem)
    rows = ", ".join(f"{count:,} rows in {name}" for name, count in done.rows.items())
    say(f"{file} holds {done.layout}; written to {done.folder}")
    if rows:
        say(rows)
    with err.status(f"measuring {done.folder}"):
        found = compare(done.folder, entry, data, device)
    print_table(
        ("net", "measured", "our mean", "published"),
        [(str(done.folder), *map(percent, (found.measured, found.recorded, found.published)))],
    )
    if found.reason:
        say(f"not measured: {found.reason}")


def data_prepare(
    name: Annotated[str, typer.Argument(help="cifar10, omniglot or tinyimagenet32")], data: Data = None
) -> None:
    """Download a data set and write it into the data folder, unless it is there."""
    from pizoo.data import dataset_path, prepare

    there = dataset_path(name, data).exists()
    path = prepare(name, data)
    say(f"{path} is there already" if there else f"wrote {path}")


def _check_in_clone(cards: Path, readme: Path | None = None) -> None:
    """Raise ValueError unless what is to be written again is there: by default it is at the top of a clone."""
    for path, option in ((cards, "--cards FOLDER"), (readme, "--readme FILE")):
        if path is not None and not path.exists():
            raise ValueError(
                f"{path} is not in {Path.cwd()}: run this at the top of a clone of pizoo, or give {option}"
            )
