"""``pizoo train --dry-run``: what training a recipe would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pizoo.cli.console import print_table, say


def print_plan(recipe: Any, data: Path | None, device: str | None, rows_on: str) -> None:
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
    print_table(columns, [row], caption=None, least=("rows on", "free"))
    if planned.rows_on == "host":
        say(planned.streaming(recipe.entry))
    if recipe.transfer:
        target = recipe.transfer.data
        known = training_images(target.name) if target.path is None and target.keep is None else None
        count = target.subset or known or len(target.load(data).train_y)
        size = kernel_bytes(count, count, 8, chosen, FACTORED) / 2**30
        told = f"measuring transfer takes {size:.1f} GiB beside: a kernel of {count:,} images of {target.name} and its factor"
        say(told)
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
        say(f"{recipe.data.name} is not here; planned for {samples:,} training images")
        return samples, 0
