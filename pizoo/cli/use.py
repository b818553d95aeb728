"""Commands that use what there is: list, evaluate, predict, its kernel, a smaller net."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from pizoo.cli.console import err, percent, print_splits, print_table, say
from pizoo.cli.options import Data, Device, Entry, Epoch, RowsOn, matching


def list_command(pattern: Annotated[str, typer.Argument(help="Glob pattern.")] = "*") -> None:
    """List the zoo's entries, what the net that ships scores and whether their weights are here."""
    from pizoo import checkpoint, zoo
    from pizoo.files import read_json

    rows = []
    for entry in matching([pattern]):
        config, results = zoo.config(entry), zoo.card(entry) / checkpoint.RESULTS
        recorded = read_json(results) if results.exists() else {}
        split = f" ({recorded['split']})" if "split" in recorded else ""
        timm_name = f"{config['architecture']}.{config['pretrained_cfg']['tag']}" if config["architecture"] else "–"
        published = config["recipe"]["published"]
        held = "here, compact" if config["pizoo"].get("compacted") else "here"
        weights = held if zoo.has_weights(entry) else "none: train it"
        accuracy = percent(recorded.get("accuracy")) + split
        rows.append((entry, timm_name, accuracy, percent(published and published["accuracy"]), weights))
    columns = ("entry", "timm name", "shipped net", "published", "weights")  # cards have the means over seeds
    print_table(columns, rows, least=("timm name",))


def evaluate(
    entry: Entry,
    data: Data = None,
    device: Device = None,
    epoch: Epoch = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Tasks of each split, for a few-shot learner.")] = None,
    ridge: Annotated[float | None, typer.Option(help="Of transfer (the one its training chose).")] = None,
    rows_on: RowsOn = "auto",
) -> None:
    """Measure the test accuracy of an entry or a checkpoint; of a few-shot learner on four splits."""
    from pizoo.evaluation.entries import evaluate as run

    result = run(entry, data_dir=data, device=device, epoch=epoch, rows_on=rows_on, tasks=tasks, ridge=ridge)
    if "splits" in result:
        print_splits([(entry, result["splits"])], result["split"])
        return
    row = (
        entry,
        f"{result['data']} test",
        str(result["images"]),
        percent(result["accuracy"]),
        f"{result['seconds']:.1f} s",
    )
    print_table(("entry", "data", "images", "accuracy", "time"), [row])
    if "ridge" in result:
        told = f"by ridge regression on the features' kernel of {result['training_images']:,} training images"
        say(f"{told}, ridge {result['ridge']:g}")


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
    found = EntryFeatures(entry, on, subset, ridges=len(ridge or ()), iterative=iterative, **options)
    if out_file is not None:
        rows, columns = found.save(out_file)
        parts = f"{len(found.features.train_y):,} training images"
        if found.features.test_y is not None:
            parts += f", then {len(found.features.test_y):,} test images"
        say(f"wrote {out_file}: {rows:,} x {columns:,}, {parts}")
    if ridge:
        result = found.regress(ridge, (tolerance or TOLERANCE) if iterative else None)
        row = (
            entry,
            found.features.name,
            f"{result['training_images']:,} / {result['test_images']:,}",
            f"{result['ridge']:g}",
            percent(result["accuracy"]),
            f"{result['feature_seconds']:.1f} s",
            f"{result['seconds']:.1f} s",
        )
        columns = ("entry", "data", "training / test images", "ridge", "accuracy", "features", "regression")
        print_table(columns, [row], least=("features", "regression"))
        for tried, accuracy in zip(ridge, result["validation_accuracies"] or (), strict=False):
            say(f"ridge {tried:g}: {accuracy:.2f} on held-out training images")
        if found.trained_on and len(ridge) > 1:
            told = "was trained on these images, the held-out ones too, which do not tell ridges apart: choose on other data"
            say(f"{entry} {told}, --on")


def predict(
    entry: Entry,
    images: Annotated[list[Path], typer.Argument(help="Image files.", exists=True)],
    data: Data = None,
    device: Device = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 3,
    rows_on: RowsOn = "auto",
) -> None:
    """Classify image files, resized to the net's input size."""
    from pizoo.evaluation.entries import classify

    for image in images:
        if image.is_dir():
            raise ValueError(f"{image} is a folder; name the image files in it: {image}/*.png")
    found = classify(entry, images, data_dir=data, device=device, top=top, rows_on=rows_on)
    rows = [
        (str(image), *(escape(f"{name} {score:.3g}") for name, score in ranked))
        for image, ranked in zip(images, found, strict=True)
    ]
    print_table(("image", *(f"{i + 1}." for i in range(top))), rows, caption=None)


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
    epoch: Epoch = None,
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
    table = [("full net", counted(made["full_rows"]), "–", percent(made["full_accuracy"]), "–")]
    for size in made["sizes"]:
        megabytes = f"{size['bytes'] / 1e6:.1f} MB"
        table.append(
            ("compact", counted(size["rows"]), megabytes, percent(size.get("accuracy")), percent(size["agreement"]))
        )
    print_table(("net", "rows", "size", f"accuracy ({size['measured_on']})", "equal predictions"), table)
    say(f"checkpoint: {out_dir}")
