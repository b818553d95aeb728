"""What several commands take, and the codes that they exit with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXIT_MISMATCH, EXIT_USAGE, EXIT_NOT_RUN = 1, 2, 3

Entry = Annotated[
    str,
    typer.Argument(help="An entry's name, the folder of a checkpoint, or where one is on the Hub: hf-hub:OWNER/NAME."),
]
Entries = Annotated[list[str], typer.Argument(help="Entries or glob patterns, quoted: 'digits_*'.")]
Epoch = Annotated[int | None, typer.Option(help="Epoch of a training checkpoint (the one it chose, else the last).")]
Data = Annotated[
    Path | None, typer.Option("--data", help="Folder of data sets ($PIZOO_DATA, else ~/.cache/pizoo/data).")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda (a GPU if there is one).")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a recipe's key: train.epochs=1. May be repeated.")
]
RowsOn = Annotated[
    str,
    typer.Option(
        help="Where an infinite net keeps its rows: device, host (they stream to the GPU), or auto: on the GPU if they fit."
    ),
]


def matching(patterns: list[str], names: list[str] | None = None) -> list[str]:
    """Entries that match the patterns, in order; a path to a checkpoint, or where one is on the Hub, passes through."""
    from pizoo import hub, zoo

    found: dict[str, None] = {}
    for pattern in patterns:
        matches = zoo.list_entries(pattern) if names is None else [n for n in names if Path(n).match(pattern)]
        if not matches and (Path(pattern).is_dir() or hub.is_address(pattern)):
            matches = [pattern]
        if not matches:
            raise zoo.unknown(pattern)
        found.update(dict.fromkeys(matches))
    return list(found)
