"""Model cards: an entry's README, with its evaluation results in the Hub's own metadata."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pizoo import checkpoint
from pizoo.data import ASSETS, dataset_path
from pizoo.evaluation.fewshot import TaskAccuracy
from pizoo.recipes import Recipe

PAPER = "https://openreview.net/forum?id=tUMr0Iox8XW"
TAGS = ["pi-net", "infinite-width", "image-classification"]
UNTRAINED = "No weights yet: `pizoo train {entry}` trains them, `pizoo.load` then takes the folder it writes."
VERIFY = "`pizoo verify {entry}` re-measures the number below"
VERIFY_QUICK = VERIFY + "; `pizoo verify --quick {entry}` checks the weights alone."
VERIFY_FULL = VERIFY + ", and needs the training images, from which kernel regressors predict."
DATASETS = {"cifar10": "CIFAR-10", "digits": "scikit-learn digits", "omniglot": "Omniglot"}

TEMPLATE = (
    """---
{{ card_data }}
---

# {{ entry }}

{{ description }}. An entry of the pizoo model zoo, from the recipe `recipes/{{ entry }}.yaml`.

```python
import pizoo

model = pizoo.load({{ arguments }})
```

{{ verification }}

## Numbers

{{ numbers }}

## Training

{{ training }}

## Licence and source

MIT. Method: Yang, Santacroce, Hu, [Efficient Computation of Deep Nonlinear Infinite-Width Neural Networks that Learn
Features]("""
    + PAPER
    + """), ICLR 2022.
"""
)


def write_config(folder: Path, recipe: Recipe, class_names: Sequence[str]) -> None:
    """Write the ``config.json`` of an entry that has a recipe and no weights yet.

    Raises:
        CheckpointError: the folder has weights, whose own config says more.
    """
    if (folder / checkpoint.MODEL).exists():
        raise checkpoint.CheckpointError(f"{folder} has weights; its {checkpoint.CONFIG} is written together with them")
    config = checkpoint.complete(recipe.config(class_names), recipe.build_model(), {})
    checkpoint.write_json(folder / checkpoint.CONFIG, config)


def write_card(folder: Path) -> Path:
    """Write ``README.md`` of a card from its ``config.json`` and, if there is one, its ``results.json``.

    Raises:
        CheckpointError: either is damaged.
    """
    config = checkpoint.read_config(folder)
    recipe = config["recipe"]
    name = recipe["data"]["name"]
    if not (folder / checkpoint.RESULTS).exists():
        data = ModelCardData(license="mit", library_name="pizoo", tags=TAGS, model_name=recipe["entry"])
        return _write(folder, data, recipe, _published(recipe), _training(recipe))
    results = checkpoint.read_json(folder / checkpoint.RESULTS)
    data = ModelCardData(
        license="mit",
        library_name="pizoo",
        tags=TAGS,
        model_name=recipe["entry"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=name,
                dataset_name=DATASETS.get(name, name),
                dataset_split=results.get("split", "test"),
                metric_type="accuracy",
                metric_value=round(results["accuracy"], 4),
            )
        ],
    )
    return _write(folder, data, recipe, _numbers(recipe, results), _training(recipe))


def _write(folder: Path, data: ModelCardData, recipe: dict[str, Any], numbers: str, training: str) -> Path:
    entry, name, path = recipe["entry"], recipe["data"]["name"], recipe["data"]["path"]
    trained = (folder / checkpoint.RESULTS).exists()
    # Kernel regressors have no quick check unless their training images ship.
    ships = path is None and dataset_path(name).is_relative_to(ASSETS)
    images_needed = recipe["train"] is None and not recipe.get("tasks") and not ships
    verification = (VERIFY_FULL if images_needed else VERIFY_QUICK).format(entry=entry)
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        entry=entry,
        description=recipe["description"],
        arguments=f'"{entry}"' if trained else f'"{entry}", pretrained=False',
        verification=verification if trained else UNTRAINED.format(entry=entry),
        numbers=numbers,
        training=training,
    )
    path = folder / "README.md"
    checkpoint.write_atomically(path, lambda temporary: temporary.write_text(str(card)))
    return path


def _numbers(recipe: dict[str, Any], results: dict[str, Any]) -> str:
    """The recorded accuracies as a table: this checkpoint, every seed, the mean, the published number."""
    if recipe.get("tasks"):
        return "\n".join([*_task_numbers(recipe, results), "", _published(recipe)])
    what = "split" if recipe["data"]["name"] == "digits" else "seed"
    lines = [
        f"Accuracy in percent on the test part of {DATASETS.get(recipe['data']['name'], recipe['data']['name'])}, after the "
        "last epoch; best epochs are test-selected.",
        "",
        "| | accuracy | best epoch | training time |\n| --- | --- | --- | --- |",
        f"| **this checkpoint** ({what} {results['shipped_seed']}) | **{results['accuracy']:.2f}** | | |",
    ]
    for run in results["seeds"]:
        best = f"{run['best_epoch']['accuracy']:.2f} (epoch {run['best_epoch']['epoch']})" if run["epochs"] else "–"
        lines.append(f"| {what} {run['seed']} | {run['accuracy']:.2f} | {best} | {run['train_seconds']:.1f} s |")
    if results["standard_error"] is not None:
        lines.append(f"| mean | {results['mean_accuracy']:.2f} ± {results['standard_error']:.2f} | | |")
    lines += ["", f"Measured on {results['hardware']}, {results['date']}."]
    return "\n".join([*lines, "", _published(recipe)])


def _task_numbers(recipe: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """The accuracies of a few-shot learner as a table: every split with its interval, every seed."""
    tasks, ways = recipe["tasks"], recipe["data"]["classes"]
    lines = [
        f"{ways}-way {tasks['shots']}-shot accuracy in percent on {DATASETS[recipe['data']['name']]}, with the 95 % interval "
        "over tasks. The split is part of every number: rotated classes (each turned into four) are easier.",
        "",
        "| classes | accuracy | tasks |\n| --- | --- | --- |",
    ]
    for split, values in results["splits"].items():
        found = TaskAccuracy(**values)
        bold = "**" if split == results["split"] else ""  # the entry's own number
        number = f"{bold}{found.accuracy:.2f}{bold} ± {found.half_width:.2f}"
        lines.append(f"| {bold}{split.replace('_', ', ')}{bold} | {number} | {found.tasks:,} |")
    if recipe["train"] is not None:
        lines += ["", "| seed | accuracy | epoch kept | training time |\n| --- | --- | --- | --- |"]
        for run in results["seeds"]:
            lines.append(
                f"| {run['seed']} | {run['accuracy']:.2f} | {run['best_epoch']['epoch']} | {run['train_seconds']:.1f} s |"
            )
    return [*lines, "", f"Measured on {results['hardware']}, {results['date']}."]


def _published(recipe: dict[str, Any]) -> str:
    published = recipe["published"]
    if published is None:
        return "The paper has no number for it."
    return f"Published: {published['accuracy']:.2f} ({published['source']}; {published['protocol']})."


def _training(recipe: dict[str, Any]) -> str:
    train = recipe["train"]
    if train is None:
        model = {key: value for key, value in recipe["model"].items() if key != "kind"}
        settings = ", ".join(f"{key} {value:g}" for key, value in model.items())
        if tasks := recipe.get("tasks"):
            return f"Not trained: adapted to each task from zero, by a step of {tasks['step_size']:g} ({settings})."
        return f"Not trained: solved in float64 on all training images ({settings})."
    clip, schedule = train["clip"], train["schedule"]
    clipped = "" if clip["max_norm"] is None else f", gradients clipped at {clip['max_norm']:g}"
    stored = "rows" if recipe["model"]["kind"] == "infpi" else "weights"
    epochs = f"{train['epochs']} epochs, batches of {train['batch_size']}"
    if tasks := recipe.get("tasks"):
        epochs = (
            f"{train['epochs']} epochs of {train['steps_per_epoch']} outer steps on {train['batch_size']} tasks each "
            f"({'first' if tasks['first_order'] else 'second'} order, inner steps of {tasks['step_size']:g})"
        )
    return (
        f"{epochs}, SGD with learning rate {train['lr']:g}, "
        f"{schedule['name']} schedule{clipped}; {stored} in {train['dtype']}. `config.json` holds the whole recipe. "
        f"To run it again: `pizoo train {recipe['entry']}`."
    )
