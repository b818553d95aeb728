"""The command line: ``pizoo list | train | evaluate | predict | kernel | verify | reproduce | compact | convert | card |
overview | publish | data``."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

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

Entry = Annotated[
    str,
    typer.Argument(help="An entry's name, the folder of a checkpoint, or where one is on the Hub: hf-hub:OWNER/NAME."),
]
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
EXIT_MISMATCH, EXIT_USAGE, EXIT_NOT_RUN = 1, 2, 3
IN_PROCESSES = ("train", "evaluate")  # what several processes, started by torchrun, do together
NAME_WIDTH, COLUMN_GAP = 25, 2  # characters: of the longest entry's name; between columns


def _leave_processes(*_: Any, **__: Any) -> None:
    from pizoo import processes

    processes.leave()


def _show_version(asked: bool) -> None:
    from pizoo import __version__

    if asked:
        _say(f"pizoo {__version__}", highlight=False)
        raise typer.Exit


@app.callback(result_callback=_leave_processes)
def _in_processes(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    from pizoo import processes

    if processes.started() > 1 and context.invoked_subcommand not in IN_PROCESSES:
        raise ValueError(
            f"torchrun is for pizoo {' and '.join(IN_PROCESSES)}; run {context.invoked_subcommand} without it"
        )
    out.quiet = processes.started() > 1 and os.environ["RANK"] != "0"


@app.command("list")
def list_command(pattern: Annotated[str, typer.Argument(help="Glob pattern.")] = "*") -> None:
    """List the zoo's entries, what they score and whether their weights are here."""
    from pizoo import checkpoint, zoo
    from pizoo.files import read_json

    rows = []
    for entry in _entries([pattern]):
        config, results = zoo.config(entry), zoo.card(entry) / checkpoint.RESULTS
        recorded = read_json(results) if results.exists() else {}
        split = f" ({recorded['split']})" if "split" in recorded else ""
        timm_name = f"{config['architecture']}.{config['pretrained_cfg']['tag']}" if config["architecture"] else "–"
        published = config["recipe"]["published"]
        held = "here, compact" if config["pizoo"].get("compacted") else "here"
        weights = held if zoo.has_weights(entry) else "none: train it"
        accuracy = _percent(recorded.get("accuracy")) + split
        rows.append((entry, timm_name, accuracy, _percent(published and published["accuracy"]), weights))
    _print_table(("entry", "timm name", "accuracy", "published", "weights"), rows, least=("timm name",))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="An entry's name, or a recipe file.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for checkpoint and log (runs/ENTRY).")] = None,
    set_: Set = None,
    seeds: Annotated[
        str | None, typer.Option(help="Train several, each in its own folder under --out: 0-2 or 0,3,7.")
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="Go on from this entry's or checkpoint's net, with a fresh read-out (train.init_from)."),
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(help="Layers to leave as they are: input, hidden or readout, or two of them: input,hidden."),
    ] = None,
    data: Data = None,
    device: Device = None,
    rows_on: RowsOn = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take: rows, memory, time.")
    ] = False,
) -> None:
    """Train a recipe. Run again with the same folder, it goes on where it was stopped."""
    from pizoo import processes
    from pizoo.recipes import load_recipe
    from pizoo.training.seeds import parse_seeds, run_seeds
    from pizoo.training.train import train as run

    given = [*(set_ or ()), *([f"train.init_from={json.dumps(init_from)}"] if init_from else [])]
    loaded = load_recipe(recipe, [*given, *([f"train.freeze=[{freeze}]"] if freeze else [])])
    if dry_run:
        _print_plan(loaded, data, device, rows_on)
        return
    folder = out_dir or Path("runs") / loaded.entry
    options = {"data_dir": data, "device": device, "rows_on": rows_on, "progress": err.is_terminal}
    try:
        if seeds is not None:
            if processes.started() > 1:
                raise ValueError(
                    "--seeds trains one net after the other; under torchrun train one seed: --set train.seed=1"
                )
            results = run_seeds(loaded, parse_seeds(seeds), folder, **options)
            rows = [(f"seed {one['seed']}", one) for one in results["seeds"]]
        else:
            results = run(loaded, folder, **options).results
            rows = [(loaded.entry, results)]
    except KeyboardInterrupt:
        err.print(
            f"interrupted; the same command goes on after the last finished epoch in {folder}",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    part, best = (loaded.tasks.headline if loaded.tasks else "test"), rows[0][1].get("best_epoch")
    if loaded.transfer:
        part = f"{loaded.transfer.data.name} test"
    if loaded.tasks:
        _print_splits([(name, one["splits"]) for name, one in rows], part)
    chosen = f"best epoch ({best['note']})" if best and loaded.train else "best epoch"
    columns = ("entry", f"{part} accuracy", chosen, "training time", "wall time", "peak memory")
    cells = [(name, *_training_cells(one, loaded.train is not None)) for name, one in rows]
    _print_table(columns, cells, least=("peak memory", "wall time"))
    if seeds is not None:
        _say(f"{loaded.entry}: {_mean(results)}")
    _say(f"checkpoint and log: {folder}")


def _training_cells(results: dict[str, Any], has_epochs: bool) -> tuple[str, ...]:
    """What a training is shown by, beside its name."""
    best = results.get("best_epoch")
    return (
        _percent(results.get("accuracy")),
        f"{_percent(best['accuracy'])} (epoch {best['epoch']})" if best and has_epochs else "–",
        f"{results['train_seconds']:.1f} s",
        f"{results['wall_seconds']:.1f} s",
        f"{results['peak_memory_bytes'] / 2**20:.0f} MiB",
    )


def _mean(results: dict[str, Any]) -> str:
    """Several seeds in a line."""
    runs, error = len(results["seeds"]), results["standard_error"]
    told = f"{_percent(results['mean_accuracy'])} %"
    if error is not None:
        told = f"{_percent(results['mean_accuracy'])} ± {error:.2f} %, {runs} runs"
        told += f" from {_percent(results['lowest_accuracy'])} to {_percent(results['highest_accuracy'])}"
    return told


def _print_plan(recipe: Any, data: Path | None, device: str | None, rows_on: str) -> None:
    """What training a recipe would take, as a table."""
    from pizoo import processes
    from pizoo.cards import duration
    from pizoo.data import training_images
    from pizoo.kernels import FACTORED, kernel_bytes
    from pizoo.memory import HEADROOM, choose_device
    from pizoo.training.finetune import initial_rows, source_net
    from pizoo.training.plan import plan, samples_per_epoch
    from pizoo.training.transfer import check_measuring
    from pizoo.training.trial import step_seconds

    if recipe.train is None:
        raise ValueError(f"{recipe.entry} is a kernel, which is not trained: there is no training to plan")
    chosen = processes.join(choose_device(device))
    samples, tested = (samples_per_epoch(recipe), 0) if recipe.tasks else _images(recipe, data)
    first = initial_rows(source_net(recipe))
    planned = plan(recipe, samples, chosen, estimate_time=True, rows_on=rows_on, first=first, tested=tested)
    seconds = planned.seconds
    if seconds is None and planned.needed <= planned.available:
        seconds = planned.steps * step_seconds(recipe, samples, chosen)
    row = (
        recipe.entry,
        f"{planned.steps:,}",
        f"{planned.rows:,}" if planned.rows else "–",
        planned.rows_on if planned.rows else "–",
        f"{planned.needed / 2**30:.2f} GiB",
        f"{planned.available / 2**30:.1f} GiB",
        "–" if seconds is None else f"about {duration(seconds)}",
    )
    columns = ("entry", "steps", "rows a layer", "rows on", "memory needed", "free", "time")
    _print_table(columns, [row], caption=None, least=("rows on", "free"))
    if planned.rows_on == "host":
        _say(planned.streaming(recipe.entry))
    if recipe.transfer:
        target = recipe.transfer.data
        known = training_images(target.name) if target.path is None and target.keep is None else None
        count = target.subset or known or len(target.load(data).train_y)
        size = kernel_bytes(count, count, 8, chosen, FACTORED) / 2**30
        told = f"measuring transfer takes {size:.1f} GiB beside: a kernel of {count:,} images of {target.name} and its factor"
        _say(told)
    planned.check(recipe.entry)
    if recipe.transfer:
        check_measuring(recipe.transfer, count, chosen, planned.needed - HEADROOM)


def _images(recipe: Any, data: Path | None) -> tuple[int, int]:
    """How many images a recipe trains on, and is tested on; of those not here, about how many to train on, and a line that
    says so."""
    from pizoo.data import DataNotFoundError, training_images

    try:
        dataset = recipe.data.load(data)
        return len(dataset.train_x), 0 if dataset.test_x is None else len(dataset.test_x)
    except DataNotFoundError:
        known = training_images(recipe.data.name) if recipe.data.path is None and recipe.data.keep is None else None
        if known is None:
            raise
        samples = min(known, recipe.data.subset or known)
        _say(f"{recipe.data.name} is not here; planned for {samples:,} training images")
        return samples, 0


def _print_splits(rows: Iterable[tuple[str, dict[str, Any]]], headline: str) -> None:
    """Few-shot accuracy of nets on every split, the entry's own number marked."""
    from pizoo.evaluation.fewshot import TaskAccuracy

    cells = []
    for name, splits in rows:
        for split, values in splits.items():
            found, mark = TaskAccuracy(**values), " (the entry's number)" if split == headline else ""
            accuracy = _percent(found.accuracy) + _plus_minus(found.half_width)
            cells.append((name, split + mark, f"{found.tasks:,}", accuracy))
    _print_table(("entry", "classes", "tasks", "accuracy (95 %)"), cells)


def _plus_minus(half_width: float | None) -> str:
    return "" if half_width is None else f" ± {half_width:.2f}"


@app.command()
def evaluate(
    entry: Entry,
    data: Data = None,
    device: Device = None,
    epoch: Annotated[
        int | None, typer.Option(help="Epoch of a training checkpoint (the one it chose, else the last).")
    ] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Tasks of each split, for a few-shot learner.")] = None,
    ridge: Annotated[float | None, typer.Option(help="Of transfer (the one its training chose).")] = None,
    rows_on: RowsOn = "auto",
) -> None:
    """Measure the test accuracy of an entry or a checkpoint; of a few-shot learner on four splits."""
    from pizoo.evaluation.entries import evaluate as run

    result = run(entry, data_dir=data, device=device, epoch=epoch, rows_on=rows_on, tasks=tasks, ridge=ridge)
    if "splits" in result:
        _print_splits([(entry, result["splits"])], result["split"])
        return
    row = (
        entry,
        f"{result['data']} test",
        str(result["images"]),
        _percent(result["accuracy"]),
        f"{result['seconds']:.1f} s",
    )
    _print_table(("entry", "data", "images", "accuracy", "time"), [row])
    if "ridge" in result:
        told = f"by ridge regression on the features' kernel of {result['training_images']:,} training images"
        _say(f"{told}, ridge {result['ridge']:g}")


@app.command()
def kernel(
    entry: Entry,
    on: Annotated[
        str | None,
        typer.Option(
            help="Data set: a name, an .npz or a folder of images (what the entry's number is on). Its pixels are normalised "
            "by the mean and spread of its training images, which on an entry's own data set is not quite what its recipe does."
        ),
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="Write the kernel here, an .npy: training images first, then test images."),
    ] = None,
    ridge: Annotated[
        list[float] | None,
        typer.Option(help="Ridge regression on it. May be repeated: the best on held-out training images is taken."),
    ] = None,
    subset: Annotated[int | None, typer.Option(min=1, help="So many training images only.")] = None,
    iterative: Annotated[
        bool,
        typer.Option(help="Solve by preconditioned conjugate gradients: for a kernel that does not fit in memory."),
    ] = False,
    tolerance: Annotated[float | None, typer.Option(help="Relative residual, with --iterative (1e-6).")] = None,
    data: Data = None,
    device: Device = None,
    epoch: Annotated[int | None, typer.Option(help="Epoch of a training checkpoint.")] = None,
    rows_on: RowsOn = "auto",
) -> None:
    """The kernel of a net's features on a data set: to a file, or straight into ridge regression."""
    from pizoo.evaluation.kernel import EntryFeatures, check_out
    from pizoo.kernels import TOLERANCE, check_ridges, check_tolerance

    if out_file is None and not ridge:
        raise ValueError("give --out FILE.npy, --ridge 1e-4, or both: there is nothing else to do with a kernel")
    check_ridges(ridge or [1.0])
    if tolerance is not None:
        check_tolerance(tolerance)
        if not iterative:
            raise ValueError(f"tolerance is {tolerance}; it is one of iterative solutions: give --iterative with it")
    if out_file is not None:
        check_out(out_file)
    options = {"data_dir": data, "device": device, "epoch": epoch, "rows_on": rows_on}
    found = EntryFeatures(entry, on, subset, tested=bool(ridge), **options)
    if out_file is not None:
        rows, columns = found.save(out_file)
        parts = f"{len(found.features.train_y):,} training images"
        if found.features.test_y is not None:
            parts += f", then {len(found.features.test_y):,} test images"
        _say(f"wrote {out_file}: {rows:,} x {columns:,}, {parts}")
    if ridge:
        result = found.regress(ridge, (tolerance or TOLERANCE) if iterative else None)
        row = (
            entry,
            found.features.name,
            f"{result['training_images']:,} / {result['test_images']:,}",
            f"{result['ridge']:g}",
            _percent(result["accuracy"]),
            f"{result['feature_seconds']:.1f} s",
            f"{result['seconds']:.1f} s",
        )
        columns = ("entry", "data", "training / test images", "ridge", "accuracy", "features", "regression")
        _print_table(columns, [row], least=("features", "regression"))
        for tried, accuracy in zip(ridge, result["validation_accuracies"] or (), strict=False):
            _say(f"ridge {tried:g}: {accuracy:.2f} on held-out training images")


@app.command()
def predict(
    entry: Entry,
    images: Annotated[list[Path], typer.Argument(help="Image files.", exists=True)],
    device: Device = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 3,
    rows_on: RowsOn = "auto",
) -> None:
    """Classify image files, resized to the net's input size."""
    from pizoo.evaluation.entries import classify

    for image in images:
        if image.is_dir():
            raise ValueError(f"{image} is a folder; name the image files in it: {image}/*.png")
    rows = [
        (str(image), *(escape(f"{name} {score:.3g}") for name, score in ranked))
        for image, ranked in zip(images, classify(entry, images, device=device, top=top, rows_on=rows_on), strict=True)
    ]
    _print_table(("image", *(f"{i + 1}." for i in range(top))), rows, caption=None)


@app.command()
def verify(
    entries: Annotated[list[str], typer.Argument(help="Entries or glob patterns, quoted: 'digits_*'.")],
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

    reports, rows = [], []
    for entry in _entries(entries):
        with err.status(f"verifying {entry}"):
            report = run(entry, data, device, quick, images)
        reports.append(report)
        probe = report.check == "probe"
        mean = _percent(report.mean) + _plus_minus(report.standard_error)
        row = (
            entry,
            {"verified": "[green]verified[/]", "mismatch": "[red]mismatch[/]"}.get(report.status, "[yellow]not run[/]"),
            "probe" if probe else _percent(report.recorded),
            "–"
            if report.measured is None
            else f"off {report.measured:.0e}"
            if probe
            else _percent(report.measured) + _plus_minus(report.half_width),
            mean,
            _percent(report.published),
            "–" if report.reproduction.startswith("no ") else report.reproduction,
            f"{report.seconds:.1f} s",
        )
        rows.append(row)
    columns = ("entry", "checkpoint", "recorded", "measured", "mean", "published", "our training", "time")
    _print_table(columns, rows, least=("time", "mean", "published"))
    for check in dict.fromkeys(report.check for report in reports if report.check.startswith("first")):
        _say(f"of the {check}, as recorded and as measured")
    for report in reports:
        if report.half_width is not None:
            told = f"measured on {report.check}, ± the 95 % interval; mean over seeds of all recorded tasks"
            _say(f"{report.entry}: {told}")
        elif "training images" in report.check:
            told = f"ridge regression on {report.check}; mean over seeds of the whole problem"
            _say(f"{report.entry}: {told}")
        if report.reason:
            _say(f"{report.entry}: {report.reason}")
    if json_file is not None:
        write_json(json_file, [report.to_dict() for report in reports])
    statuses = {report.status for report in reports}
    if "mismatch" in statuses or (strict and any(report.reproduction == "below" for report in reports)):
        raise typer.Exit(EXIT_MISMATCH)
    if "not run" in statuses:
        raise typer.Exit(EXIT_NOT_RUN)


@app.command()
def reproduce(
    entries: Annotated[list[str], typer.Argument(help="Entries or glob patterns, quoted: 'digits_*'.")],
    runs: Annotated[
        Path | None, typer.Option(help="Folder for the trainings (runs); finished ones are not run again.")
    ] = None,
    cards: Annotated[Path | None, typer.Option(help="Folder to write the cards into (model_cards).")] = None,
    seeds: Annotated[str | None, typer.Option(help="Which seeds: 0-2 or 0,3,7 (as the recipe says).")] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Keep the card, its net and its seeds, and record --seeds beside them.")
    ] = False,
    set_: Set = None,
    data: Data = None,
    device: Device = None,
) -> None:
    """Make entries again from their recipes: train all seeds, tune kernels, ship one net, verify it, write its card.

    Exit code: 0 all verified, 1 a mismatch.
    """
    from pizoo.cards import duration, write_card
    from pizoo.evaluation.verify import verify as check
    from pizoo.recipes import list_recipes, load_recipe
    from pizoo.training.reproduce import add_seeds
    from pizoo.training.reproduce import reproduce as anew
    from pizoo.training.seeds import parse_seeds, seeds_differ
    from pizoo.zoo import TUNED

    if set_ and None in (runs, cards):
        raise ValueError("--set makes other entries than the zoo's: give --cards and --runs of their own for them")
    if add and seeds is None:
        raise ValueError("--add records seeds beside those of a card: say which, --seeds 2")
    runs, cards = runs or Path("runs"), cards or Path("model_cards")
    which = None if seeds is None else parse_seeds(seeds)
    run = add_seeds if add else anew
    made = {entry: load_recipe(entry, set_ or ()) for entry in _entries(entries, list_recipes())}
    verified, seconds = True, 0.0
    for entry, recipe in made.items():
        card, options = cards / entry, {"data_dir": data, "device": device, "progress": err.is_terminal}
        # Among others a kernel is made once.
        once = which and len(made) > 1 and not seeds_differ(recipe)
        results = run(recipe, card, runs / entry, which[:1] if once else which, **options)
        seconds += results["total_wall_seconds"]
        tuned = f", tuned {_percent(results['tuned']['accuracy'])} %" if "tuned" in results else ""
        compact = f", compact {_percent(results['accuracy'])} %" if "compact" in results else ""
        reports = [check(folder, data, device) for folder in (card, *([card / TUNED] if tuned else []))]
        verified = verified and all(report.status == "verified" for report in reports)
        statuses = ", ".join(dict.fromkeys(report.status for report in reports))
        time = duration(results["total_wall_seconds"])
        _say(f"{entry}: {_mean(results)}{tuned}{compact}; {statuses}; {time}; card in {card}")
    for entry in made:
        write_card(cards / entry)  # once more: cards compare themselves with those beside them
    if len(made) > 1:
        _say(f"all: trained, tuned and solved in {duration(seconds)}")
    if not verified:
        raise typer.Exit(EXIT_MISMATCH)


@app.command()
def card(
    entries: Annotated[list[str], typer.Argument(help="Entries or glob patterns, quoted: 'digits_*'.")],
    cards: Annotated[Path, typer.Option(help="Folder of the cards.")] = Path("model_cards"),
) -> None:
    """Write cards again from what they record and what their recipes say by now; nothing is trained or measured."""
    from pizoo.cards import refresh
    from pizoo.recipes import list_recipes, load_recipe
    from pizoo.zoo import TUNED

    _check_in_clone(cards)
    for entry in _entries(entries, list_recipes()):
        refresh(cards / entry, load_recipe(entry))
        if (cards / entry / TUNED).is_dir():
            refresh(cards / entry / TUNED, load_recipe(entry))
        _say(f"{entry}: card in {cards / entry}")


@app.command()
def overview(
    cards: Annotated[Path, typer.Option(help="Folder of the cards.")] = Path("model_cards"),
    readme: Annotated[Path, typer.Option(help="Where the table is to stand, too.")] = Path("README.md"),
) -> None:
    """Write the table of the whole zoo again, after cards have changed: into the folder of the cards and the README."""
    from pizoo.overview import write_overview

    _check_in_clone(cards, readme)
    for path in write_overview(cards, readme):
        _say(f"wrote {path}")


@app.command()
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
    _print_table(("file", "bytes", "SHA-256", "on the Hub" if dry_run else "before"), rows, caption=None)
    told = f"{done.bytes_to_send:,} bytes in {sum(not upload.present for upload in done.uploads)} files"
    commit = "" if dry_run else f", commit {done.commit}"
    _say(f"{'would send' if dry_run else 'sent'} {told} to {done.address}{commit}", highlight=False)


@app.command()
def compact(
    source: Annotated[str, typer.Argument(help="An entry's name, or the folder of a checkpoint.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the compact checkpoint.")],
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of each hidden layer; the read-out gets half (what --megabytes hold)."),
    ] = None,
    megabytes: Annotated[
        float | None, typer.Option(min=0.001, help="Size of the file, at most (as the recipe says, else 25).")
    ] = None,
    dtype: Annotated[
        Literal["int8", "float16"] | None, typer.Option(help="Of the rows; of int8 (the default) twice as many fit.")
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(min=1, help="Views of each image to fit to, mirrored and moved (as the recipe says, else 6)."),
    ] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Measure smaller sizes as well, and draw them.")] = False,
    epoch: Annotated[
        int | None, typer.Option(help="Epoch of a training checkpoint (the one it chose, else the last).")
    ] = None,
    data: Data = None,
    device: Device = None,
) -> None:
    """Make a net that computes the same with fewer rows: one small file."""
    from pizoo.recipes import Compact
    from pizoo.training.compact import compact_checkpoint
    from pizoo.zoo import counted

    given = {"megabytes": megabytes, "rows": rows, "dtype": dtype, "views": views}
    settings = Compact(**{name: value for name, value in given.items() if value is not None})
    options = {"epoch": epoch, "data_dir": data, "device": device, "progress": err.is_terminal}
    results = compact_checkpoint(source, out_dir, settings, curve=curve, **options)
    made = results["compact"]
    table = [("full net", counted(made["full_rows"]), "–", _percent(made["full_accuracy"]), "–")]
    for size in made["sizes"]:
        megabytes = f"{size['bytes'] / 1e6:.1f} MB"
        table.append(
            ("compact", counted(size["rows"]), megabytes, _percent(size.get("accuracy")), _percent(size["agreement"]))
        )
    _print_table(("net", "rows", "size", f"accuracy ({size['measured_on']})", "equal predictions"), table)
    _say(f"checkpoint: {out_dir}")


@app.command()
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
    _say(f"{file} holds {done.layout}; written to {done.folder}")
    if rows:
        _say(rows)
    with err.status(f"measuring {done.folder}"):
        found = compare(done.folder, entry, data, device)
    _print_table(
        ("net", "measured", "our mean", "published"),
        [(str(done.folder), *map(_percent, (found.measured, found.recorded, found.published)))],
    )
    if found.reason:
        _say(f"not measured: {found.reason}")


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="cifar10, omniglot or tinyimagenet32")], data: Data = None
) -> None:
    """Download a data set and write it into the data folder."""
    from pizoo.data import prepare

    _say(f"wrote {prepare(name, data)}")


def _check_in_clone(cards: Path, readme: Path | None = None) -> None:
    """Raise ValueError unless what is to be written again is there: by default it is at the top of a clone."""
    for path, option in ((cards, "--cards FOLDER"), (readme, "--readme FILE")):
        if path is not None and not path.exists():
            raise ValueError(
                f"{path} is not in {Path.cwd()}: run this at the top of a clone of pizoo, or give {option}"
            )


def _entries(patterns: list[str], names: list[str] | None = None) -> list[str]:
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


def _print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str | None = "accuracies in percent",
    least: Sequence[str] = (),
) -> None:
    """Print a table. Nothing is cut, and no word broken: names too long for the first column go on in the next line.

    Args:
        least: columns to leave out, in this order, where a terminal is too narrow for all.
    """
    first, *rest = columns
    rows = [dict(zip(columns, row, strict=False)) for row in rows]  # of fewer classes than columns there may be fewer
    longest = max((len(row[first]) for row in rows), default=0)

    def widths(shown: list[str], one_line: bool = False) -> dict[str, int]:
        return {column: _column_width(column, [row.get(column, "") for row in rows], one_line) for column in shown}

    def room(shown: list[str], one_line: bool = False) -> int:
        return out.width - sum(width + COLUMN_GAP for width in widths(shown, one_line).values())

    shown, wanted = rest, min(longest, NAME_WIDTH)
    for column in least:
        if room(shown) < wanted:
            shown = [other for other in shown if other != column]
    # Headers go on in the next line before anything else does.
    fixed = widths(shown) if room(shown) >= wanted and room(shown, one_line=True) < longest else {}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in shown:
        table.add_column(column, overflow="fold", width=fixed.get(column))
    width = max(room(shown), wanted // 2)
    for row in rows:
        folded = "\n".join(row[first][i : i + width] for i in range(0, len(row[first]), width))
        table.add_row(escape(folded), *(row.get(column, "") for column in shown))
    out.print()
    out.print(table)
    missing = [column for column in rest if column not in shown]
    notes = [*([caption] if caption else []), *([f"no room here for: {', '.join(missing)}"] if missing else [])]
    out.print(f"\n[dim italic]{'; '.join(notes)}[/]" if notes else "")


def _column_width(header: str, cells: Iterable[str], one_line: bool) -> int:
    """Characters that a column needs for its cells whole, and its header in one line or a word in each."""
    head = [header] if one_line else header.split()
    return max(len(part) for part in (*head, *(Text.from_markup(cell).plain for cell in cells)))


def _say(text: str, highlight: bool = True) -> None:
    """Print a line whole: brackets in it are no markup, and no terminal's width breaks a path."""
    out.print(text, markup=False, highlight=highlight, soft_wrap=True)


def _percent(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    """Run the command line; what a user can mend is one line, not a traceback."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        _fail(error, EXIT_USAGE)
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # damaged checkpoints, trainings that diverge, failed downloads, no GPU
        _fail(error, EXIT_MISMATCH)


def _show_warning(message: Warning | str, *where: Any) -> None:
    err.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)


def _fail(error: Exception, code: int) -> NoReturn:
    from pizoo import processes

    # Messages hold shapes and paths in brackets, which rich would take for markup.
    err.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    if processes.started() > 1:  # whatever still waits for the other processes is not waited for
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
