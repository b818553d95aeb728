"""A card as a whole: what is written into its folder, its header and the order of its sections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pizoo import checkpoint
from pizoo.cards.compact import compact
from pizoo.cards.compared import compared, published
from pizoo.cards.images import Card
from pizoo.cards.kinds import read
from pizoo.cards.record import data_sets
from pizoo.cards.text import mean_and_error
from pizoo.cards.training import training, tuning
from pizoo.config import CONFIG, complete, read_config
from pizoo.data import IMAGENET32
from pizoo.files import CheckpointError, read_json, write_atomically, write_json
from pizoo.plots import CURVES, SIZES, draw_curves, draw_sizes
from pizoo.recipes import Recipe, decisive
from pizoo.zoo import TUNED, stand_in

PAPER = "https://openreview.net/forum?id=tUMr0Iox8XW"
UNTRAINED = "No weights yet: `pizoo train {entry}` trains them, `pizoo.load` then takes the folder it writes."
# Of data that may not be handed on.
NO_WEIGHTS = (
    "No weights yet: its data set cannot be had freely. `pizoo train {entry}` trains them on its official files; a "
    "checkpoint of the paper's own code can be converted; `{standin}` is trained on freely usable data by the same recipe."
)

TEMPLATE = (
    """---
{{ card_data }}
---

# {{ entry }}

{{ description }}. An entry of the pizoo model zoo, from the recipe `recipes/{{ recipe }}.yaml`.

{{ headline }}

```python
{{ code }}
```

{{ verification }}

{{ sections }}

## Licence and citation

MIT. Method: Yang, Santacroce, Hu, [Efficient Computation of Deep Nonlinear Infinite-Width Neural Networks that Learn
Features]("""
    + PAPER
    + """), ICLR 2022.

```bibtex
@inproceedings{yang2022efficient,
  title     = {Efficient Computation of Deep Nonlinear Infinite-Width Neural Networks that Learn Features},
  author    = {Yang, Greg and Santacroce, Michael and Hu, Edward J.},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  url       = {"""
    + PAPER
    + """}
}
```
"""
)


def write_config(folder: Path, recipe: Recipe, class_names: Sequence[str]) -> None:
    """Write the ``config.json`` of an entry that has a recipe and no weights yet.

    Raises:
        CheckpointError: the folder has weights, whose own config says more.
    """
    if (folder / checkpoint.MODEL).exists():
        raise CheckpointError(f"{folder} has weights; its {CONFIG} is written together with them")
    config = complete(recipe.config(class_names), recipe.build_model(), {})
    write_json(folder / CONFIG, config)


def refresh(folder: Path, recipe: Recipe) -> None:
    """Write a card again with what its recipe says by now: texts, published numbers, tolerances.

    Raises:
        CheckpointError: the recipe would train or solve something else than what the card is of; something is damaged.
    """
    recipe = check_recipe(folder, recipe)
    config = read_config(folder)
    write_json(folder / CONFIG, {**config, "recipe": recipe.to_dict()})
    write_card(folder)


def check_recipe(folder: Path, recipe: Recipe) -> Recipe:
    """An entry's recipe as its card is of it: with the seed of what ships and, of a tuned kernel, the settings found.

    Raises:
        CheckpointError: the recipe would train or solve something else than what the card is of; something is damaged.
    """
    config = read_config(folder)
    if (folder / checkpoint.RESULTS).exists():
        recipe = recipe.with_seed(read_json(folder / checkpoint.RESULTS)["shipped_seed"])
    if folder.name == TUNED:
        recipe = recipe.with_model(**{k: v for k, v in config["recipe"]["model"].items() if k != "kind"})
    if decisive(config["recipe"]) != decisive(recipe.to_dict()):
        raise CheckpointError(f"{folder} is the card of another recipe than {recipe.entry} is now: make it again")
    return recipe


def write_card(folder: Path) -> Path:
    """Write ``README.md`` of a card and the picture in it, from what it records; see :func:`card_text`."""
    card = read(folder)
    if card.curves:
        accuracy = card.published and card.published["accuracy"]
        draw_curves(folder / CURVES, card.seeds, accuracy, card.rows)
    if card.compact:
        draw_sizes(folder / SIZES, card.compact)
    path, text = folder / "README.md", _text(card)
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return path


def card_text(folder: Path) -> str:
    """What ``README.md`` of a card has to say: of its ``config.json``, its results if there are any, and the cards beside it.

    Raises:
        CheckpointError: something recorded is damaged.
    """
    return _text(read(folder))


def _text(card: Card) -> str:
    tuned = ", tuned on held-out training images" if card.folder.name == TUNED else ""
    text = ModelCard.from_template(
        _metadata(card),
        template_str=TEMPLATE,
        entry=card.name,
        recipe=card.recipe["entry"],
        description=f"{card.recipe['description']}{tuned}",
        headline=_headline(card),
        code=card.code() if card.results else f'import pizoo\n\nmodel = pizoo.load("{card.name}", pretrained=False)',
        verification=card.verification() if card.results else _without_weights(card),
        sections="\n\n".join(f"## {title}\n\n{text}" for title, text in _sections(card)),
    )
    return str(text)


def _metadata(card: Card) -> ModelCardData:
    """The card's header, in the Hub's own words; with evaluation results where there are any."""
    options = {"license": "mit", "library_name": "pizoo", "pipeline_tag": "image-classification", "tags": card.tags}
    results, runs = card.results, len(card.seeds)
    if not results:
        return ModelCardData(model_name=card.name, **options)
    measured = {f"accuracy of this checkpoint{card.chosen}": results["accuracy"]}
    if runs > 1:
        measured[f"mean accuracy over {runs} {card.run}s{card.chosen}"] = results["mean_accuracy"]
    shared = {
        "task_type": "image-classification",
        "dataset_type": data_sets(card.recipe)[1],
        "dataset_name": card.data,
        "dataset_split": card.split,
        "metric_type": "accuracy",
    }
    evaluations = [
        EvalResult(metric_name=name, metric_value=round(value, 4), **shared) for name, value in measured.items()
    ]
    return ModelCardData(model_name=card.name, eval_results=evaluations, **options)


def _headline(card: Card) -> str:
    results, runs = card.results, len(card.seeds)
    there = f"Published: {card.published['accuracy']:.2f} %." if card.published else ""
    if not results:
        return f"Not measured yet. {there}".rstrip()
    over = f", mean over {runs} {card.run}s ± standard error" if runs > 1 else ""
    mean = f"**{mean_and_error(results)} %** of {card.measured_on} are classified correctly{card.chosen}{over}."
    told = [mean, card.best_epochs]
    if card.compact:
        megabytes = card.compact["sizes"][-1]["bytes"] / 1e6
        told.append(f"This checkpoint, a compact net of {megabytes:.3g} MB: {results['accuracy']:.2f} %.")
    if "tuned" in results:
        told.append(f"Tuned on held-out training images: {results['tuned']['accuracy']:.2f} %.")
    return " ".join(filter(None, [*told, there]))


def _without_weights(card: Card) -> str:
    if card.recipe["data"]["name"] == IMAGENET32:
        return NO_WEIGHTS.format(entry=card.name, standin=stand_in(card.name))
    return UNTRAINED.format(entry=card.name)


def _sections(card: Card) -> Iterator[tuple[str, str]]:
    """Titles and texts, in the order a reader asks."""
    if card.results:
        yield "Numbers", card.numbers()
    if card.compact:
        yield "A compact net", compact(card)
    yield "The published number", published(card)
    if beside := compared(card):
        yield f"Beside the others, on the same {card.unit}s", beside
    yield "Training", training(card)
    if "tuned" in card.results:
        yield "Tuning", tuning(card)
