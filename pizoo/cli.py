"""The command line: ``pizoo list | train | evaluate | predict | verify | reproduce | compact | data``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A model zoo of π-nets that can prove its numbers.",
)
data_app = typer.Typer(no_args_is_help=True, help="Data sets.")
app.add_typer(data_app, name="data")
out = Console()
err = Console(stderr=True)
if not out.is_terminal:
    out = Console(width=120)  # logs and pipes have no width of their own

Data = Annotated[
    Path | None, typer.Option("--data", help="Folder of data sets ($PIZOO_DATA, else ~/.cache/pizoo/data).")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda (a GPU if there is one).")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a recipe's key: train.epochs=1. May be repeated.")
]
EXIT_MISMATCH, EXIT_USAGE, EXIT_NOT_RUN = 1, 2, 3
NAME_WIDTH, COLUMN_WIDTH = (
    13,
    12,
)  # characters: of the longest entry's name; of any other column, with the gap before it


@app.command("list")
def list_command(pattern: Annotated[str, typer.Argument(help="Glob pattern.")] = "*") -> None:
    """List the zoo's entries, what they score and whether their weights are here."""
    from pizoo import checkpoint, zoo

    rows = []
    for entry in _entries([pattern]):
        config, results = zoo.config(entry), zoo.card(entry) / checkpoint.RESULTS
        recorded = checkpoint.read_json(results)["accuracy"] if results.exists() else None
        timm_name = f"{config['architecture']}.{config['pretrained_cfg']['tag']}" if config["architecture"] else "–"
        published = config["recipe"]["published"]
        held = "here, compact" if config["pizoo"].get("compacted") else "here"
        weights = held if zoo.has_weights(entry) else "none: train it"
        rows.append((entry, timm_name, _percent(recorded), _percent(published and published["accuracy"]), weights))
    _print_table(("entry", "timm name", "accuracy", "published", "weights"), rows)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="An entry's name, or a recipe file.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for checkpoint and log (runs/ENTRY).")] = None,
    set_: Set = None,
    data: Data = None,
    device: Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take: rows, memory, time.")
    ] = False,
) -> None:
    """Train a recipe. Run again with the same folder, it goes on where it was stopped."""
    from pizoo.recipes import load_recipe
    from pizoo.training.supervised import train as run

    loaded = load_recipe(recipe, set_ or ())
    if dry_run:
        _print_plan(loaded, data, device)
        return
    folder = out_dir or Path("runs") / loaded.entry
    try:
        result = run(loaded, folder, data_dir=data, device=device, progress=err.is_terminal)
    except KeyboardInterrupt:
        err.print(f"interrupted; the same command goes on after the last finished epoch in {folder}", soft_wrap=True)
        raise typer.Exit(130) from None
    results = result.results
    best = results.get("best_epoch")
    row = (
        loaded.entry,
        _percent(results.get("accuracy")),
        f"{_percent(best['accuracy'])} (epoch {best['epoch']})" if best and loaded.train else "–",
        f"{results['train_seconds']:.1f} s",
        f"{results['peak_memory_bytes'] / 2**20:.0f} MiB",
    )
    _print_table(("entry", "test accuracy", "best epoch (test-selected)", "training time", "peak memory"), [row])
    out.print(f"checkpoint and log: {folder}", markup=False, soft_wrap=True)


def _print_plan(recipe: Any, data: Path | None, device: str | None) -> None:
    """What training a recipe would take, as a table."""
    from pizoo.evaluation.accuracy import choose_device
    from pizoo.training.plan import plan

    if recipe.train is None:
        raise ValueError(f"{recipe.entry} is solved, not trained: there is no training to plan")
    planned = plan(recipe, len(recipe.data.load(data).train_x), choose_device(device), estimate_time=True)
    row = (
        recipe.entry,
        f"{planned.steps:,}",
        f"{planned.rows:,}" if planned.rows else "–",
        f"{planned.needed / 2**30:.2f} GiB",
        f"{planned.available / 2**30:.1f} GiB",
        "–" if planned.seconds is None else f"about {_duration(planned.seconds)}",
    )
    _print_table(("entry", "steps", "rows a layer", "memory needed", "free", "time"), [row])
    planned.check(recipe.entry)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


@app.command()
def evaluate(
    entry: Annotated[str, typer.Argument(help="An entry's name, or the folder of a checkpoint.")],
    data: Data = None,
    device: Device = None,
    epoch: Annotated[int | None, typer.Option(help="Epoch of a training checkpoint (the last).")] = None,
) -> None:
    """Measure the test accuracy of an entry or a checkpoint."""
    from pizoo.evaluation.entries import evaluate as run

    result = run(entry, data_dir=data, device=device, epoch=epoch)
    row = (
        entry,
        f"{result['data']} test",
        str(result["images"]),
        _percent(result["accuracy"]),
        f"{result['seconds']:.1f} s",
    )
    _print_table(("entry", "data", "images", "accuracy", "time"), [row])


@app.command()
def predict(
    entry: Annotated[str, typer.Argument(help="An entry's name, or the folder of a checkpoint.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.", exists=True, dir_okay=False)],
    device: Device = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 3,
) -> None:
    """Classify image files, resized to the net's input size."""
    from pizoo.evaluation.entries import classify

    rows = [
        (str(image), *(escape(f"{name} {score:.3g}") for name, score in ranked))
        for image, ranked in zip(images, classify(entry, images, device=device, top=top), strict=True)
    ]
    _print_table(("image", *(f"{i + 1}." for i in range(top))), rows)


@app.command()
def verify(
    entries: Annotated[list[str], typer.Argument(help="Entries or glob patterns, quoted: 'digits_*'.")],
    data: Data = None,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the reports here as well.")] = None,
    quick: Annotated[
        bool,
        typer.Option(
            help="Check the weights by a stored probe; needs no data set. Not for kernel entries whose training images do "
            "not ship (cifar10_nngp, cifar10_ntk): they predict from those images, and are reported as not run."
        ),
    ] = False,
    strict: Annotated[bool, typer.Option(help="Also fail when a training falls below the published number.")] = False,
) -> None:
    """Re-measure checkpoints: is each what it claims, and does our training reproduce the paper?

    Exit code: 0 all verified, 1 a mismatch, 2 wrong usage, 3 some could not be run.
    """
    from pizoo import checkpoint
    from pizoo.evaluation.verify import verify as run

    reports, rows = [], []
    for entry in _entries(entries):
        with err.status(f"verifying {entry}"):
            report = run(entry, data, device, quick)
        reports.append(report)
        probe = report.check == "probe"
        mean = _percent(report.mean) + (f" ± {report.standard_error:.2f}" if report.standard_error is not None else "")
        row = (
            entry,
            {"verified": "[green]verified[/]", "mismatch": "[red]mismatch[/]"}.get(report.status, "[yellow]not run[/]"),
            "probe" if probe else _percent(report.recorded),
            "–" if report.measured is None else f"off {report.measured:.0e}" if probe else _percent(report.measured),
            mean,
            _percent(report.published),
            "–" if report.reproduction.startswith("no ") else report.reproduction,
            f"{report.seconds:.1f} s",
        )
        rows.append(row)
    columns = ("entry", "checkpoint", "recorded", "measured", "mean", "published", "our training", "time")
    _print_table(columns, rows)
    for report in reports:
        if report.reason:
            out.print(f"{report.entry}: {report.reason}", markup=False, soft_wrap=True)
    if json_file is not None:
        checkpoint.write_json(json_file, [report.to_dict() for report in reports])
    statuses = {report.status for report in reports}
    if "mismatch" in statuses or (strict and any(report.reproduction == "below" for report in reports)):
        raise typer.Exit(EXIT_MISMATCH)
    if "not run" in statuses:
        raise typer.Exit(EXIT_NOT_RUN)


@app.command()
def reproduce(
    entries: Annotated[list[str], typer.Argument(help="Entries or glob patterns, quoted: 'digits_*'.")],
    runs: Annotated[Path, typer.Option(help="Folder for the trainings; finished ones are not run again.")] = Path(
        "runs"
    ),
    cards: Annotated[Path, typer.Option(help="Folder to write the cards into.")] = Path("model_cards"),
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds (as the recipe says).")] = None,
    data: Data = None,
    device: Device = None,
) -> None:
    """Make entries again from their recipes: train all seeds, ship one net, write its card."""
    from pizoo.recipes import list_recipes, load_recipe
    from pizoo.training.reproduce import reproduce as run

    for entry in _entries(entries, list_recipes()):
        recipe = load_recipe(entry)
        which = None if seeds is None else range(seeds)
        results = run(
            recipe, cards / entry, runs / entry, which, data_dir=data, device=device, progress=err.is_terminal
        )
        spread = "" if results["standard_error"] is None else f" ± {results['standard_error']:.2f}"
        out.print(
            f"{entry}: {results['mean_accuracy']:.2f}{spread} %, {len(results['seeds'])} runs, card in {cards / entry}"
        )


@app.command()
def compact(
    source: Annotated[str, typer.Argument(help="An entry's name, or the folder of a checkpoint.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the compact checkpoint.")],
    rows: Annotated[
        int | None, typer.Option(help="Rows of each hidden layer; the read-out gets a quarter (what --megabytes hold).")
    ] = None,
    megabytes: Annotated[float, typer.Option(help="Size of the file, at most.")] = 25.0,
    steps: Annotated[int | None, typer.Option(help="Steps of distillation (10,000); 0 is quick.")] = None,
    views: Annotated[int, typer.Option(min=1, help="Views of each image to fit to, mirrored and moved.")] = 6,
    curve: Annotated[bool, typer.Option("--curve", help="Measure smaller sizes as well, and draw them.")] = False,
    epoch: Annotated[int | None, typer.Option(help="Epoch of a training checkpoint (the last).")] = None,
    data: Data = None,
    device: Device = None,
) -> None:
    """Make a net that computes the same with fewer rows: one small file."""
    from pizoo.compaction.full import STEPS
    from pizoo.compaction.ship import compact_checkpoint

    results = compact_checkpoint(
        source,
        out_dir,
        rows,
        megabytes=megabytes,
        steps=STEPS if steps is None else steps,
        views=views,
        curve=curve,
        epoch=epoch,
        data_dir=data,
        device=device,
        progress=err.is_terminal,
    )
    full = results["full"]
    table = [("full net", _counts(full["rows"]), "–", _percent(full["accuracy"]), "–")]
    for point in results["compact"]["sizes"]:
        size = f"{point['bytes'] / 1e6:.1f} MB"
        found = (_percent(point.get("accuracy")), _percent(point["agreement"]))
        table.append(("compact", _counts(point["rows"]), size, *found))
    _print_table(("net", "rows", "size", "accuracy", "equal predictions"), table)
    out.print(f"checkpoint: {out_dir}", markup=False, soft_wrap=True)


def _counts(rows: dict[str, int]) -> str:
    return " + ".join(f"{count:,}" for count in rows.values())


@data_app.command("prepare")
def data_prepare(name: Annotated[str, typer.Argument(help="cifar10")], data: Data = None) -> None:
    """Download a data set and write it into the data folder."""
    from pizoo.data import prepare

    out.print(f"wrote {prepare(name, data)}")


def _entries(patterns: list[str], names: list[str] | None = None) -> list[str]:
    """Entries that match the patterns, in order; a path to a checkpoint passes through."""
    from pizoo import zoo

    found: dict[str, None] = {}
    for pattern in patterns:
        matches = zoo.list_entries(pattern) if names is None else [n for n in names if Path(n).match(pattern)]
        if not matches and Path(pattern).is_dir():
            matches = [pattern]
        if not matches:
            raise zoo.unknown(pattern)
        found.update(dict.fromkeys(matches))
    return list(found)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print accuracies in percent. Nothing is cut: names too long for the first column go on in the next line."""
    first, *rest = columns
    table = Table(box=box.SIMPLE_HEAD, caption="accuracies in percent", caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in rest:
        table.add_column(column, overflow="fold")
    width = max(NAME_WIDTH, out.width - COLUMN_WIDTH * len(rest))
    for name, *cells in rows:
        folded = "\n".join(name[i : i + width] for i in range(0, len(name), width))
        table.add_row(escape(folded), *cells)
    out.print(table)


def _percent(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    """Run the command line; what a user can mend is one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        _fail(error, EXIT_USAGE)
    except RuntimeError as error:  # damaged checkpoints, trainings that diverge, downloads that fail, no such device
        _fail(error, EXIT_MISMATCH)


def _fail(error: Exception, code: int) -> NoReturn:
    # Messages hold shapes and paths in brackets, which rich would take for markup.
    err.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
