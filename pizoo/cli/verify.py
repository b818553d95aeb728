"""``pizoo verify``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pizoo.cli.console import err, percent, print_table, say
from pizoo.cli.options import EXIT_MISMATCH, EXIT_NOT_RUN, Data, Device, Entries, matching

if TYPE_CHECKING:
    from pizoo.evaluation.verify import VerifyReport


def verify(
    entries: Entries,
    data: Data = None,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the reports here as well.")] = None,
    quick: Annotated[
        bool,
        typer.Option(
            help="Check the weights by a stored probe; needs no data set. Of kernel entries it checks what a few training "
            "images contribute."
        ),
    ] = False,
    images: Annotated[
        int | None,
        typer.Option(help="Measure on this many first test images only: a smaller check, for kernel entries on a CPU."),
    ] = None,
    strict: Annotated[bool, typer.Option(help="Also fail when a training falls below the published number.")] = False,
) -> None:
    """Re-measure checkpoints: is each what it claims, and does our training reproduce the paper?

    Exit code: 0 all verified, 1 a mismatch, 2 wrong usage, 3 some could not be run.
    """
    from pizoo.evaluation.verify import verify as run
    from pizoo.files import write_json

    reports = {}
    for entry in matching(entries):
        with err.status(f"verifying {entry}"):
            reports[entry] = run(entry, data, device, quick, images)
    _print(reports)
    if json_file is not None:
        write_json(json_file, [report.to_dict() for report in reports.values()])
    statuses = {report.status for report in reports.values()}
    if "mismatch" in statuses or (strict and any(report.reproduction == "below" for report in reports.values())):
        raise typer.Exit(EXIT_MISMATCH)
    if "not run" in statuses:
        raise typer.Exit(EXIT_NOT_RUN)


def _print(reports: dict[str, VerifyReport]) -> None:
    """Reports as a table, and in lines below it what its numbers are of."""
    columns = ("entry", "checkpoint", "recorded", "measured", "mean", "published", "our training", "time")
    rows = [(entry, *_cells(report)) for entry, report in reports.items()]
    print_table(columns, rows, least=("time", "mean", "published"))
    for check in dict.fromkeys(report.check for report in reports.values() if report.check.startswith("first")):
        say(f"of the {check}, as recorded and as measured")
    for report in reports.values():
        if report.half_width is not None:
            told = f"measured on {report.check}, ± the 95 % interval; mean over seeds of all recorded tasks"
            say(f"{report.entry}: {told}")
    for told, entries in _alike({report.entry: _part(report) for report in reports.values()}):
        say(f"{entries}: {told}")
    for reason, entries in _alike({report.entry: report.reason for report in reports.values()}):
        say(f"{entries}: {reason}")


def _part(report: VerifyReport) -> str:
    """Of what problem the numbers of transfer are; empty for other entries, and where nothing was measured."""
    if report.measured is None or "training images" not in report.check:
        return ""
    if not report.part:
        return f"ridge regression on {report.check}"
    return (
        f"recorded and measured are ridge regression on a part, {report.check}; mean and published are on all of them"
    )


def _alike(told: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What is told of entries, once for all of whom the same is told but for their name, and their names; not what is empty."""
    from pizoo.zoo import list_entries

    names, entries = list_entries(), dict[str, list[str]]()
    for entry, text in told.items():
        entries.setdefault(text.replace(entry, "ENTRY") if entry in names else text, []).append(entry)
    for text, alike in entries.items():
        if text:
            yield (text if len(alike) > 1 else told[alike[0]]), ", ".join(alike)


def _cells(report: VerifyReport) -> tuple[str, ...]:
    """What a report is shown by, beside its entry."""
    from pizoo.evaluation.reproduction import verdict

    marked = {"verified": "[green]verified[/]", "mismatch": "[red]mismatch[/]"}
    probe, part = report.check == "probe", " (part)" if report.part else ""
    measured = percent(report.measured, report.half_width) + part
    return (
        marked.get(report.status, "[yellow]not run[/]"),
        "probe" if probe else percent(report.recorded) + part,
        f"off {report.measured:.0e}" if probe and report.measured is not None else measured,
        percent(report.mean, report.standard_error),
        percent(report.published),
        verdict(report.reproduction),
        f"{report.seconds:.1f} s",
    )
