"""Model cards: an entry's README, with its evaluation results in the Hub's own metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pizoo import checkpoint

PAPER = "https://openreview.net/forum?id=tUMr0Iox8XW"
DATASETS = {"cifar10": "CIFAR-10", "digits": "scikit-learn digits"}

TEMPLATE = """---
{{ card_data }}
---

# {{ entry }}

{{ description }}. An entry of the pizoo model zoo, from the recipe `recipes/{{ entry }}.yaml`.

```python
import pizoo

model = pizoo.load("{{ entry }}")
```

`pizoo verify {{ entry }}` re-measures the number below; `pizoo verify --quick {{ entry }}` checks the weights alone.

## Numbers

{{ numbers }}

## How it was trained

{{ training }}

## Licence and source

MIT. Method: Yang, Santacroce, Hu, [Efficient Computation of Deep Nonlinear Infinite-Width Neural Networks that Learn
Features](""" + PAPER + """), ICLR 2022.
"""


def write_card(folder: Path) -> Path:
    """Write ``README.md`` of a shipped checkpoint from its ``config.json`` and ``results.json``.

    Raises:
        CheckpointError: either is missing or damaged.
    """
    config, results = checkpoint.read_config(folder), checkpoint.read_json(folder / checkpoint.RESULTS)
    recipe = config["recipe"]
    name = recipe["data"]["name"]
    data = ModelCardData(
        license="mit",
        library_name="pizoo",
        tags=["pi-net", "infinite-width", "image-classification"],
        model_name=recipe["entry"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=name,
                dataset_name=DATASETS.get(name, name),
                dataset_split="test",
                metric_type="accuracy",
                metric_value=round(results["accuracy"], 4),
            )
        ],
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        entry=recipe["entry"],
        description=recipe["description"],
        numbers=_numbers(recipe, results),
        training=_training(recipe, results),
    )
    path = folder / "README.md"
    checkpoint.write_atomically(path, lambda temporary: temporary.write_text(str(card)))
    return path


def _numbers(recipe: dict[str, Any], results: dict[str, Any]) -> str:
    """The recorded accuracies as a table: this checkpoint, every seed, the mean, the published number."""
    what = "split" if recipe["data"]["name"] == "digits" else "seed"
    lines = [
        f"Accuracy in percent on the test part of {DATASETS.get(recipe['data']['name'], recipe['data']['name'])}, after the "
        "last epoch; best epochs are test-selected.",
        "",
        f"| | accuracy | best epoch | training time |\n| --- | --- | --- | --- |",
        f"| **this checkpoint** ({what} {results['shipped_seed']}) | **{results['accuracy']:.2f}** | | |",
    ]
    for run in results["seeds"]:
        best = f"{run['best_epoch']['accuracy']:.2f} (epoch {run['best_epoch']['epoch']})" if run["epochs"] else "–"
        lines.append(f"| {what} {run['seed']} | {run['accuracy']:.2f} | {best} | {run['train_seconds']:.1f} s |")
    if results["standard_error"] is not None:
        lines.append(f"| mean | {results['mean_accuracy']:.2f} ± {results['standard_error']:.2f} | | |")
    published = recipe["published"]
    lines.append(f"| published | {published['accuracy']:.2f} ({published['source']}) | | |" if published else "| published | none | | |")
    lines += ["", f"Measured on {results['hardware']}, {results['date']}."]
    return "\n".join(lines)


def _training(recipe: dict[str, Any], results: dict[str, Any]) -> str:
    train = recipe["train"]
    if train is None:
        model = {key: value for key, value in recipe["model"].items() if key != "kind"}
        settings = ", ".join(f"{key} {value:g}" for key, value in model.items())
        return f"Not trained: solved in float64 on all training images ({settings})."
    return (
        f"{train['epochs']} epochs, batches of {train['batch_size']}, plain SGD with learning rate {train['lr']:g}, weights in "
        f"{train['dtype']}. `config.json` holds the whole recipe, `results.json` the curve of every run. To run it again: "
        f"`pizoo train {recipe['entry']}`."
    )
