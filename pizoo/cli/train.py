"""Commands that make entries: train, reproduce."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pizoo.cli.console import err, percent, print_splits, print_table, say
from pizoo.cli.options import EXIT_MISMATCH, Data, Device, Entries, RowsOn, Set, matching
from pizoo.cli.plan import print_plan


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
        print_plan(loaded, data, device, rows_on)
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
        told = f"interrupted; the same command goes on after the last finished epoch in {folder}"
        err.print(told, markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    _print_results(loaded, rows)
    if seeds is not None:
        say(f"{loaded.entry}: {_mean(results)}")
    say(f"checkpoint and log: {folder}")


def _print_results(recipe: Any, rows: list[tuple[str, dict[str, Any]]]) -> None:
    """What trainings gave and took, as a table; of a few-shot learner, on every split before."""
    part, best = (recipe.tasks.headline if recipe.tasks else "test"), rows[0][1].get("best_epoch")
    if recipe.transfer:
        part = f"{recipe.transfer.data.name} test"
    if recipe.tasks:
        print_splits([(name, one["splits"]) for name, one in rows], part)
    chosen = f"best epoch ({best['note']})" if best and recipe.train else "best epoch"
    columns = ("entry", f"{part} accuracy", chosen, "training time", "wall time", "peak memory")
    cells = [(name, *_training_cells(one, recipe.train is not None)) for name, one in rows]
    print_table(columns, cells, least=("peak memory", "wall time"))


def _training_cells(results: dict[str, Any], has_epochs: bool) -> tuple[str, ...]:
    """What a training is shown by, beside its name."""
    best = results.get("best_epoch")
    return (
        percent(results.get("accuracy")),
        f"{percent(best['accuracy'])} (epoch {best['epoch']})" if best and has_epochs else "–",
        f"{results['train_seconds']:.1f} s",
        f"{results['wall_seconds']:.1f} s",
        f"{results['peak_memory_bytes'] / 2**20:.0f} MiB",
    )


def _mean(results: dict[str, Any]) -> str:
    """Several seeds in a line."""
    mean = f"{percent(results['mean_accuracy'], results['standard_error'])} %"
    if results["standard_error"] is None:
        return mean
    lowest, highest = percent(results["lowest_accuracy"]), percent(results["highest_accuracy"])
    return f"{mean}, {len(results['seeds'])} runs from {lowest} to {highest}"


def _beside(results: dict[str, Any]) -> str:
    """What a card has beside the mean: the tuned kernel's number, the compact net's."""
    tuned = f", tuned {percent(results['tuned']['accuracy'])} %" if "tuned" in results else ""
    return tuned + (f", compact {percent(results['accuracy'])} %" if "compact" in results else "")


def reproduce(
    entries: Entries,
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
    made = {entry: load_recipe(entry, set_ or ()) for entry in matching(entries, list_recipes())}
    verified, seconds = True, 0.0
    for entry, recipe in made.items():
        card, options = cards / entry, {"data_dir": data, "device": device, "progress": err.is_terminal}
        # Among others a kernel is made once.
        once = which and len(made) > 1 and not seeds_differ(recipe)
        results = run(recipe, card, runs / entry, which[:1] if once else which, **options)
        seconds += results["total_wall_seconds"]
        folders = (card, card / TUNED) if "tuned" in results else (card,)
        reports = [check(folder, data, device) for folder in folders]
        verified = verified and all(report.status == "verified" for report in reports)
        statuses = ", ".join(dict.fromkeys(report.status for report in reports))
        time = duration(results["total_wall_seconds"])
        say(f"{entry}: {_mean(results)}{_beside(results)}; {statuses}; {time}; card in {card}")
    for entry in made:
        write_card(cards / entry)  # once more: cards compare themselves with those beside them
    if len(made) > 1:
        say(f"all: trained, tuned and solved in {duration(seconds)}")
    if not verified:
        raise typer.Exit(EXIT_MISMATCH)
