"""Model cards: an entry's README, with its evaluation results in the Hub's own metadata."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor

from pizoo import checkpoint
from pizoo.config import CONFIG, complete, read_config
from pizoo.data import ASSETS, IMAGENET32, dataset_path
from pizoo.evaluation.accuracy import paired_difference, within
from pizoo.evaluation.fewshot import SPLITS, TaskAccuracy
from pizoo.files import CheckpointError, read_json, read_tensors, write_atomically, write_json
from pizoo.plots import CURVES, SIZES, draw_curves, draw_sizes, rows_by_epoch
from pizoo.recipes import Recipe, decisive
from pizoo.zoo import TUNED, counted

PAPER = "https://openreview.net/forum?id=tUMr0Iox8XW"
TAGS = ["pi-net", "infinite-width", "image-classification"]
TASK_TAGS = [*TAGS, "few-shot-learning"]
TUNED_SHOWN = 8  # settings of a search
DATASETS = {
    "cifar10": "CIFAR-10",
    "digits": "scikit-learn digits",
    "imagenet32": "250 classes of ImageNet at 32x32",
    "omniglot": "Omniglot",
    "tinyimagenet32": "Tiny-ImageNet at 32x32",
}
UNTRAINED = "No weights yet: `pizoo train {entry}` trains them, `pizoo.load` then takes the folder it writes."
VERIFY = (
    "`pizoo verify {entry}` re-measures the number of this checkpoint; `pizoo verify --quick {entry}` checks the weights "
    "alone, without data."
)
# Of data that may not be handed on.
NO_WEIGHTS = (
    "No weights yet: its data set cannot be had freely. `pizoo train {entry}` trains them on its official files; a "
    "checkpoint of the paper's own code can be converted; `{standin}` is trained on freely usable data by the same recipe."
)
# Of features for another data set.
VERIFY_TRANSFER = (
    "`pizoo verify {entry}` re-measures this checkpoint: on a large GPU by ridge regression on all {train:,} training images "
    "of {data}, elsewhere on {small:,} of them and the first {small_test:,} test images, of which another number is recorded "
    "({small_accuracy:.2f} %); `pizoo verify --quick {entry}` checks the weights alone, without data."
)
# Of what learns tasks.
VERIFY_TASKS = (
    "`pizoo verify {entry}` re-measures this checkpoint on the first {verified:,} of the recorded tasks; "
    "`pizoo verify --quick {entry}` checks its logits on one stored task, without data."
)
ADAPT = """\
# support_x [{support}, {size}], ink 1 and paper 0; support_y: labels 0 to {last}
predictor = model.adapt(support_x, support_y, {arguments})
logits = predictor(query_x)"""
# Of kernel regressors whose training images do not ship.
ATTACH = """data = pizoo.zoo.dataset(model.config)  # the training images it predicts from
model.attach(pizoo.zoo.preprocessing(model.config)(data.train_x, torch.float64))"""
VERIFY_KERNEL = """\
It holds dual coefficients and the fingerprint of the training images they belong to, and needs those images to predict.

- `pizoo verify {entry}` re-measures its number. Nothing is solved again: the kernel between {test} test and {train}
  training images is computed in float64, block by block (a few GB of memory, minutes on two CPU cores).
- `pizoo verify --images 1000 {entry}` is a smaller check: the first 1,000 test images, against what is recorded of them.
- `pizoo verify --quick {entry}` needs no data: it checks the SHA-256 of the coefficients, and what the first {probe} training
  images contribute to the scores of {probe} test images."""

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
    card = _Card.read(folder)
    if card.curves:
        published = card.published and card.published["accuracy"]
        draw_curves(folder / CURVES, card.results["seeds"], published, card.rows)
    if card.compact:
        draw_sizes(folder / SIZES, card.compact)
    path, text = folder / "README.md", card_text(folder)
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return path


def card_text(folder: Path) -> str:
    """What ``README.md`` of a card has to say: of its ``config.json``, its results if there are any, and the cards beside it.

    Raises:
        CheckpointError: something recorded is damaged.
    """
    card = _Card.read(folder)
    text = ModelCard.from_template(
        _metadata(card),
        template_str=TEMPLATE,
        entry=card.name,
        recipe=card.recipe["entry"],
        description=card.recipe["description"]
        + (", tuned on held-out training images" if folder.name == TUNED else ""),
        headline=_headline(card),
        code=_code(card),
        verification=_verification(card),
        sections="\n\n".join(f"## {title}\n\n{text}" for title, text in _sections(card)),
    )
    return str(text)


@dataclass(frozen=True)
class _Card:
    """What a card's folder records.

    Attributes:
        recipe: of its ``config.json``.
        results: its ``results.json``; empty for an entry without weights.
        correct: which test images were classified correctly, by the shipped net and every seed's, bool [n]; of tasks, which
            queries of the headline's, bool [T, Q].
    """

    folder: Path
    recipe: dict[str, Any]
    results: dict[str, Any]
    correct: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> _Card:
        recipe = read_config(folder)["recipe"]
        if not (folder / checkpoint.RESULTS).exists():
            return cls(folder, recipe, {}, {})
        results = read_json(folder / checkpoint.RESULTS)
        return cls(folder, recipe, results, read_tensors(folder / checkpoint.CORRECT, results["correct_sha256"]))

    @property
    def name(self) -> str:
        """What ``pizoo.load`` takes."""
        return f"{self.recipe['entry']}/{TUNED}" if self.folder.name == TUNED else self.recipe["entry"]

    @property
    def data(self) -> str:
        """What its number is on."""
        name = (self.transfer or self.recipe)["data"]["name"]
        return DATASETS.get(name, name)

    @property
    def source(self) -> str:
        """What it is trained on."""
        return DATASETS.get(self.recipe["data"]["name"], self.recipe["data"]["name"])

    @property
    def transfer(self) -> dict[str, Any] | None:
        """The recipe's part about another data set; None: it is measured on the one it is trained on."""
        return self.recipe.get("transfer")

    @property
    def tasks(self) -> dict[str, Any] | None:
        """The recipe's few-shot part; None: supervised."""
        return self.recipe.get("tasks")

    @property
    def count(self) -> int:
        """How many test images, or tasks."""
        return len(self.correct[checkpoint.SHIPPED])

    @property
    def compact(self) -> dict[str, Any] | None:
        """Of a checkpoint that is a compact net, what is recorded of how it was made."""
        return self.results.get("compact")

    @property
    def made_of(self) -> str:
        """Which training the shipped net is from, and whether it is that net or a compact one."""
        return f"{'compact, of ' if self.compact else ''}{self.run} {self.results['shipped_seed']}"

    @property
    def unit(self) -> str:
        """What is counted."""
        return "task" if self.tasks else "test image"

    @property
    def split(self) -> str:
        """What its number is on."""
        return self.tasks["headline"] if self.tasks else "test"

    @property
    def chosen(self) -> str:
        """Which epoch's net its number is of, to end a sentence with; nothing for kernels."""
        if not self.recipe["train"]:
            return ""
        if self.transfer:
            return ", by ridge regression on its features' kernel, epoch and ridge chosen on held-out training images"
        return ", epoch chosen on rotated validation classes" if self.tasks else " after the last epoch"

    @property
    def published(self) -> dict[str, Any] | None:
        return self.recipe["published"]

    @property
    def papers_entry(self) -> str:
        """The paper's entry: this one, or the one that it stands in for, on data that may not be handed on."""
        return self.recipe["entry"].replace(f"tiny{IMAGENET32}", IMAGENET32)

    @property
    def run(self) -> str:
        """What differs from one of its trainings to the next."""
        return "split" if self.recipe["data"]["name"] == "digits" else "seed"

    @property
    def curves(self) -> bool:
        return bool(self.results) and "curve" in self.results["seeds"][0]

    @property
    def rows(self) -> list[int] | None:
        """Of a growing layer after every epoch; None of what does not grow."""
        return rows_by_epoch(self.results.get("history", ()))

    @property
    def needs_images(self) -> bool:
        """Whether it is a kernel regressor whose training images do not ship."""
        data = self.recipe["data"]
        ships = data["path"] is None and dataset_path(data["name"]).is_relative_to(ASSETS)
        return self.recipe["train"] is None and not self.tasks and not ships


def _metadata(card: _Card) -> ModelCardData:
    """The card's header, in the Hub's own words; with evaluation results where there are any."""
    options = {"license": "mit", "library_name": "pizoo", "pipeline_tag": "image-classification"}
    options["tags"] = TASK_TAGS if card.tasks else TAGS
    results = card.results
    if not results:
        return ModelCardData(model_name=card.name, **options)
    measured = {f"accuracy of this checkpoint{card.chosen}": results["accuracy"]}
    if len(results["seeds"]) > 1:
        measured[f"mean accuracy over {len(results['seeds'])} {card.run}s{card.chosen}"] = results["mean_accuracy"]
    shared = {
        "task_type": "image-classification",
        "dataset_type": (card.transfer or card.recipe)["data"]["name"],
        "dataset_name": card.data,
        "dataset_split": card.split,
        "metric_type": "accuracy",
    }
    evaluations = [
        EvalResult(metric_name=name, metric_value=round(value, 4), **shared) for name, value in measured.items()
    ]
    return ModelCardData(model_name=card.name, eval_results=evaluations, **options)


def _headline(card: _Card) -> str:
    results, runs = card.results, len(card.results.get("seeds", []))
    published = f"Published: {card.published['accuracy']:.2f} %." if card.published else ""
    if not results:
        return f"Not measured yet. {published}".rstrip()
    over = f", mean over {runs} {card.run}s ± standard error" if runs > 1 else ""
    measured_on = f"the {card.count:,} test images of {card.data}"
    if card.tasks:
        measured_on = (
            f"the queries of {card.count:,} tasks of {card.data} ({_shape(card)}, {words(card.split)} classes)"
        )
    told = [f"**{mean_and_error(results)} %** of {measured_on} are classified correctly{card.chosen}{over}."]
    if card.recipe["train"] and not card.tasks and not card.transfer:
        told.append(f"Best epochs, test-selected: {results['mean_best_epoch_accuracy']:.2f} %.")
    if card.compact:
        megabytes = card.compact["sizes"][-1]["bytes"] / 1e6
        told.append(f"This checkpoint, a compact net of {megabytes:.3g} MB: {results['accuracy']:.2f} %.")
    if "tuned" in results:
        told.append(f"Tuned on held-out training images: {results['tuned']['accuracy']:.2f} %.")
    return " ".join([*told, published]).rstrip()


def mean_and_error(results: dict[str, Any]) -> str:
    """The recorded mean over seeds, with its standard error if there is one."""
    return _plus_minus(results["mean_accuracy"], results["standard_error"])


def _plus_minus(accuracy: float, error: float | None) -> str:
    return f"{accuracy:.2f}" + ("" if error is None else f" ± {error:.2f}")


def _shape(card: _Card) -> str:
    return f"{card.recipe['data']['classes']}-way {card.tasks['shots']}-shot"


def words(split: str) -> str:
    """``"test_rotated"`` as a reader says it."""
    return ", ".join(split.split("_"))


def _code(card: _Card) -> str:
    if not card.results:
        return f'import pizoo\n\nmodel = pizoo.load("{card.name}", pretrained=False)'
    load = f'model = pizoo.load("{card.name}")'
    if card.tasks:
        return f"import pizoo\n\n{load}\n{_adapt(card)}"
    return f"import torch\n\nimport pizoo\n\n{load}\n{ATTACH}" if card.needs_images else f"import pizoo\n\n{load}"


def _adapt(card: _Card) -> str:
    tasks, ways = card.tasks, card.recipe["data"]["classes"]
    options = {key: tasks[key] for key, usual in (("steps", 1), ("layers", "readout")) if tasks[key] != usual}
    return ADAPT.format(
        support=ways * tasks["shots"],
        size=", ".join(map(str, card.recipe["data"]["input_size"])),
        last=ways - 1,
        arguments=", ".join(f"{key}={value!r}" for key, value in {"step_size": tasks["step_size"], **options}.items()),
    )


def _verification(card: _Card) -> str:
    if not card.results:
        if card.recipe["data"]["name"] == IMAGENET32:
            return NO_WEIGHTS.format(entry=card.name, standin=card.name.replace(IMAGENET32, f"tiny{IMAGENET32}"))
        return UNTRAINED.format(entry=card.name)
    if card.transfer:
        full, small = card.results["transfer"], card.results["verification"]
        return VERIFY_TRANSFER.format(
            entry=card.name,
            data=card.data,
            train=full["training_images"],
            small=small["training_images"],
            small_test=small["test_images"],
            small_accuracy=small["accuracy"],
        )
    if card.tasks:
        return VERIFY_TASKS.format(entry=card.name, verified=card.results["verification"]["tasks"])
    if not card.needs_images:
        return VERIFY.format(entry=card.name)
    train = f"{card.recipe['data']['subset']:,}" if card.recipe["data"]["subset"] else "all"
    return VERIFY_KERNEL.format(entry=card.name, test=f"{card.count:,}", train=train, probe=checkpoint.PROBE_INPUTS)


def _sections(card: _Card) -> Iterator[tuple[str, str]]:
    """Titles and texts, in the order a reader asks."""
    if card.results:
        numbers = _task_numbers if card.tasks else _transfer_numbers if card.transfer else _numbers
        yield "Numbers", numbers(card)
    if card.compact:
        yield "A compact net", _compact(card)
    yield "The published number", _published(card)
    if compared := _compared(card):
        yield f"Beside the others, on the same {card.unit}s", compared
    yield "Training", _training(card)
    if "tuned" in card.results:
        yield "Tuning", _tuning(card)


EPOCHS = (
    " Rows are appended and stay: those after an epoch are the first of those after the next, and the net of every epoch "
    "loads from the training's folder (`pizoo evaluate runs/{entry} --epoch 1`)."
)
COMPARED = (
    "Accuracy here minus accuracy there in points, mean over seeds, {unit} by {unit}; 95 % interval over {unit}s:"
)


def _numbers(card: _Card) -> str:
    """The recorded accuracies as a table: this checkpoint, every run, their mean; where and when they were measured."""
    results, trained = card.results, card.recipe["train"] is not None

    def row(name: str, accuracy: str, best: str, time: str) -> str:
        return "| " + " | ".join((name, accuracy, best, time) if trained else (name, accuracy, time)) + " |"

    lines = [
        f"Accuracy in percent on the test part of {card.data}; times are wall time, evaluation and saving included.",
        "",
        row("", "after the last epoch" if trained else "accuracy", "best epoch, test-selected", "time"),
        row("---", "---", "---", "---"),
        row(f"**this checkpoint** ({card.made_of})", f"**{results['accuracy']:.2f}**", "", ""),
    ]
    for run in results["seeds"]:
        best = f"{run['best_epoch']['accuracy']:.2f} (epoch {run['best_epoch']['epoch']})"
        lines.append(row(f"{card.run} {run['seed']}", f"{run['accuracy']:.2f}", best, duration(run["wall_seconds"])))
    if len(results["seeds"]) > 1:
        total = f"{duration(results['total_wall_seconds'])} in all"
        lines.append(
            row("mean ± standard error", mean_and_error(results), f"{results['mean_best_epoch_accuracy']:.2f}", total)
        )
    return "\n".join([*lines, "", _measured(results)])


def _task_numbers(card: _Card) -> str:
    """The recorded accuracies of a few-shot learner as a table: this checkpoint, every seed and their mean, on every split."""
    results, trained = card.results, card.recipe["train"] is not None

    def row(name: str, accuracies: Iterable[str], chosen: str, time: str) -> str:
        return "| " + " | ".join((name, *accuracies, *((chosen, time) if trained else ()))) + " |"

    def cells(splits: dict[str, Any], headline: str | None = None) -> Iterator[str]:
        for split in SPLITS:
            found, mark = TaskAccuracy(**splits[split]), "**" if split == headline else ""
            yield f"{mark}{found.accuracy:.2f}{mark} ± {found.half_width:.2f}"

    times = "; times are wall time, evaluation and saving included." if trained else "."
    validation = card.tasks["validation_tasks"]
    heads = [f"**{words(split)}**" if split == card.split else words(split) for split in SPLITS]
    lines = [
        f"{_shape(card)} accuracy in percent on {card.count:,} tasks of {card.data} each, with its 95 % interval over tasks. "
        f"The classes are part of every number: rotated ones (each turned into four) are easier. This entry's number is on "
        f"**{words(card.split)}** classes{times}",
        "",
        row("", heads, f"epoch chosen (on {validation:,} tasks of validation, rotated)", "time"),
        row("---", ["---"] * len(SPLITS), "---", "---"),
    ]
    shipped = f"**this checkpoint** ({card.made_of})" if trained else "**this kernel**"
    lines.append(row(shipped, cells(results["splits"], card.split), "", ""))
    for run in results["seeds"] if trained else ():
        best = f"{run['best_epoch']['epoch']} ({run['best_epoch']['accuracy']:.2f})"
        lines.append(row(f"{card.run} {run['seed']}", cells(run["splits"]), best, duration(run["wall_seconds"])))
    if len(results["seeds"]) > 1:
        means = [results["mean_splits"][split] for split in SPLITS]
        means = [_plus_minus(mean["accuracy"], mean["standard_error"]) for mean in means]
        total = f"{duration(results['total_wall_seconds'])} in all"
        lines.append(row("mean ± standard error over seeds", means, "", total))
    if card.published:
        there = [f"{card.published['accuracy']:.2f}" if split == card.split else "" for split in SPLITS]
        lines.append(row("published", there, "", ""))
    return "\n".join([*lines, "", _measured(results)])


def _transfer_numbers(card: _Card) -> str:
    """Accuracies on the target as a table: at the epoch and ridge chosen, at the published ones; and of the net itself."""
    results, transfer = card.results, card.transfer

    def row(name: str, *cells: str) -> str:
        return "| " + " | ".join((name, *cells)) + " |"

    def setting(found: dict[str, Any]) -> str:
        return f"epoch {found['epoch']}, ridge {found['ridge']:g}"

    shipped = results["transfer"]
    lines = [
        f"Accuracy in percent on the {shipped['test_images']:,} test images of {card.data}, by ridge regression on the kernel "
        f"of the features of its {shipped['training_images']:,} training images, in float64. Epoch and ridge are chosen on "
        f"{100 * transfer['validation']:g} % of the training images, held out (accuracy on these in brackets). Times are "
        "wall time, measuring included.",
        "",
        row(
            "",
            "chosen",
            f"at the published epoch {transfer['epoch']} and ridge {transfer['ridge']:g}",
            f"the net itself on {card.source}",
            "time",
        ),
        row("---", "---", "---", "---", "---"),
        row(
            f"**this checkpoint** ({card.made_of})",
            f"**{results['accuracy']:.2f}**, {setting(shipped)}",
            "",
            "",
            "",
        ),
    ]
    for run in results["seeds"]:
        found, fixed = run["transfer"], run["transfer"]["published_setting"]["accuracy"]
        lines.append(
            row(
                f"{card.run} {run['seed']}",
                f"{run['accuracy']:.2f}, {setting(found)} ({found['validation_accuracy']:.2f})",
                "" if fixed is None else f"{fixed:.2f}",
                "" if found["source"]["accuracy"] is None else f"{found['source']['accuracy']:.2f}",
                duration(run["wall_seconds"]),
            )
        )
    if len(results["seeds"]) > 1:
        lines.append(
            row("mean ± standard error", mean_and_error(results), "", "", duration(results["total_wall_seconds"]))
        )
    return "\n".join([*lines, "", _measured(results)])


def _measured(results: dict[str, Any]) -> str:
    """Where and when."""
    commit = f", commit {results['commit']}" if results["commit"] else ""
    return f"Measured on {results['hardware']}, {results['date']}, torch {results['versions']['torch']}{commit}."


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would choose."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _published(card: _Card) -> str:
    """The paper's number, how far ours is from it and why."""
    published, results = card.published, card.results
    if published is None:
        told = ["The paper has no number for it."]
        if (there := _in_the_paper(card)) is not None:
            told = [
                f"The paper has no number for it; of the same net trained on {DATASETS[IMAGENET32]} it has {there:.2f}."
            ]
        return _with_reasons(card, told)
    told = [f"{published['accuracy']:.2f} ({published['source']}; {published['protocol']})."]
    if results:
        away, tolerance = results["mean_accuracy"] - published["accuracy"], card.recipe["tolerance"]["reproduce"]
        told.append(
            f"The number here is {abs(away):.2f} points {'above' if away > 0 else 'below'} it, "
            + ("within" if within(tolerance, away, 0) else f"{abs(away) - tolerance:.2f} beyond")
            + f" the recipe's tolerance of {tolerance:g}; {card.count:,} {card.unit}s alone give a standard error of "
            f"{_chance(card):.2f} points."
        )
    if published["rerun"] is not None:
        here = (
            f", {abs(results['mean_accuracy'] - published['rerun']):.2f} points from the number here" if results else ""
        )
        told.append(f"The paper's own code, run once with this recipe, gives {published['rerun']:.2f}{here}.")
    return _with_reasons(card, told)


def _with_reasons(card: _Card, told: list[str]) -> str:
    return " ".join([*told, *filter(None, [card.recipe["differs"]])])


def _chance(card: _Card) -> float:
    """Standard error in points that its number has for being measured on so many test images, or tasks."""
    if card.tasks:
        return card.results["splits"][card.split]["standard_error"]
    share = card.results["mean_accuracy"] / 100
    return 100 * (share * (1 - share) / card.count) ** 0.5


def _compared(card: _Card) -> str:
    """A table: how far this entry is from those beside it on the same test images, or tasks; nothing without others."""
    if not card.results or card.run == "split":  # other splits are other test images
        return ""
    beside = [
        config.parent for config in sorted(card.folder.parent.glob(f"*/{CONFIG}")) if config.parent != card.folder
    ]
    like = [folder for folder in beside if _data_sets(read_config(folder)["recipe"]) == _data_sets(card.recipe)]
    others = [other for other in map(_Card.read, like) if other.results]
    others = [other for other in others if (other.split, other.count) == (card.split, card.count)]
    if not others:
        return ""
    here, numbers = _in_the_paper(card), list(map(_in_the_paper, others))
    printed = here is not None and numbers != [None] * len(numbers)
    heads = ["entry", "difference", "interval", *(["published difference"] if printed else [])]
    lines = [COMPARED.format(unit=card.unit), "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for other, there in zip(others, numbers, strict=True):
        away = paired_difference(_share(card), _share(other))
        cells = [f"`{other.name}`", f"{away.points:+.2f}", f"{away.low:+.2f} to {away.high:+.2f}"]
        cells += ["–" if there is None else f"{here - there:+.2f}"] if printed else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _data_sets(recipe: dict[str, Any]) -> tuple[str, str]:
    """What a recipe trains on, and what its number is on."""
    return recipe["data"]["name"], (recipe.get("transfer") or recipe)["data"]["name"]


def _in_the_paper(card: _Card) -> float | None:
    """The paper's number for an entry; for one that stands in for the paper's, on other data, that one's."""
    if card.published or card.papers_entry == card.recipe["entry"]:
        return card.published and card.published["accuracy"]
    there = card.folder.parent / card.papers_entry
    return _in_the_paper(_Card.read(there)) if (there / CONFIG).exists() else None


def _share(card: _Card) -> Tensor:
    """For each test image the share of seeds that classify it correctly; for each task the mean share of its queries."""
    rights = [card.correct[checkpoint.seed_key(run["seed"])] for run in card.results["seeds"]]
    return torch.stack(rights).double().mean(0).view(card.count, -1).mean(1)


def _training(card: _Card) -> str:
    recipe, train = card.recipe, card.recipe["train"]
    subset = recipe["data"]["subset"]
    images = f"{subset:,} of the training images" if subset else "all training images"
    if train is None and card.tasks:
        return (
            f"Not trained: adapted to each task from zero, by a step of {card.tasks['step_size']:g} in the kernel's space of "
            f"functions ({_settings(recipe['model'])})."
        )
    if train is None:
        return f"Not trained: solved in float64 on {images} ({_settings(recipe['model'])})."
    clip, schedule = train["clip"], train["schedule"]
    clipped = "" if clip["max_norm"] is None else f", gradients clipped at {clip['max_norm']:g}"
    stored = "rows" if recipe["model"]["kind"] == "infpi" else "weights"
    measured = "validation" if card.tasks else "transfer" if card.transfer else "test"
    drawn = (
        f"over the epochs, {measured} accuracy against rows"
        if card.rows
        else f"and {measured} accuracy over the epochs"
    )
    picture = f"\n\n![Training loss {drawn}]({CURVES})"
    images = f"{images} of {card.source}" if card.transfer else images
    epochs = f"{train['epochs']} epochs on {images}, batches of {train['batch_size']}"
    if card.tasks:
        order = "first" if card.tasks["first_order"] else "second"
        epochs = (
            f"{train['epochs']} epochs of {train['steps_per_epoch']} outer steps on {train['batch_size']} tasks each ({order} "
            f"order, inner steps of {card.tasks['step_size']:g})"
        )
    return (
        f"{epochs}, SGD with learning rate {train['lr']:g}, "
        f"{schedule['name']} schedule{clipped}; {stored} in {train['dtype']}. `config.json` holds the whole recipe. "
        f"To run it again: `pizoo train {recipe['entry']}`; all of it, this card included: `pizoo reproduce {recipe['entry']}`."
        f"{EPOCHS.format(entry=recipe['entry']) if card.rows else ''}{' ' + recipe['cost'] if recipe.get('cost') else ''}"
        f"{picture if (card.folder / CURVES).exists() else ''}"
    )


def _compact(card: _Card) -> str:
    """What the shipped net was made of, and how near it comes at this and smaller sizes."""
    made, full = card.compact, counted(card.compact["full_rows"])
    entry = card.recipe["entry"]
    part = f"the queries of {card.count:,} tasks of {words(card.split)} classes" if card.tasks else "the test part"
    errors = {"logits_error": "logits' error"}
    if "features_error" in made["sizes"][-1]:
        errors["features_error"] = "features' error, on validation, rotated classes"
    heads = ["net", "rows", "size", "accuracy", "predictions equal to the full net's", *errors.values(), "time"]
    lines = [
        f"The net that was trained has {full} rows in its growing layers. The checkpoint here computes nearly the same with "
        f"{counted(made['sizes'][-1]['rows'])}: landmarks drawn from the training images, a ridge regression layer on layer, "
        f"rounded to {card.recipe['compact']['dtype']} so that the errors make up for each other; no test image had a part "
        f"in it. It is a net like any other: it trains and grows on. Accuracies and equal predictions in percent, on {part}; "
        f"errors are relative.",
        "",
        f"| {' | '.join(heads)} |",
        "| --- " * len(heads) + "|",
        f"| full | {full} |  | {made['full_accuracy']:.2f} |" + "  |" * (len(heads) - 4),
    ]
    for size in made["sizes"]:
        near = [f"{size['accuracy']:.2f}", f"{size['agreement']:.2f}", *(f"{size[error]:.3f}" for error in errors)]
        cells = [counted(size["rows"]), f"{size['bytes'] / 1e6:.1f} MB", *near, duration(size["seconds"])]
        lines.append(f"| compact | {' | '.join(cells)} |")
    full_run = next(run for run in card.results["seeds"] if run["seed"] == card.results["shipped_seed"])
    if not card.transfer and not within(0, full_run["accuracy"], made["full_accuracy"]):
        lines += [
            "",
            f"Here the full net computes in float32 between its layers; in {card.recipe['train']['dtype']}, as it was "
            f"trained, it is the one above with {full_run['accuracy']:.2f}.",
        ]
    return "\n".join(
        [
            *lines,
            "",
            f"![Agreement and accuracy against size]({SIZES})",
            "",
            f"Made on {made['hardware']}, {made['date']}. To make one of another size from a full net: `pizoo compact FOLDER "
            f"--megabytes 10 --out {entry}-10mb`.",
        ]
    )


def _settings(model: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in model.items() if key not in ("kind", "validation_accuracy"))


def _tuning(card: _Card) -> str:
    """What the search on held-out training images tried, and its best."""
    tuned, entry = card.results["tuned"], card.recipe["entry"]
    solved = [tried for tried in tuned["tried"] if tried["validation_accuracy"] is not None]
    best = sorted(solved, key=lambda tried: -tried["validation_accuracy"])[:TUNED_SHOWN]
    lines = [
        f"{len(tuned['tried'])} settings were solved on {tuned['training_images']:,} training images and measured on "
        f"{tuned['validation_images']:,} held-out ones, never on the test images, in {duration(tuned['seconds'])}. The best, "
        f"{_settings(tuned['settings'])}, solved again on all of them, gives **{tuned['accuracy']:.2f}** on the test images: "
        f"`pizoo verify {entry}/{TUNED}`, [its own card]({TUNED}/README.md). The best {len(best)} (`results.json` has all):",
        "",
        "| settings | validation accuracy |\n| --- | --- |",
        *(f"| {_settings(tried)} | {tried['validation_accuracy']:.2f} |" for tried in best),
    ]
    return "\n".join(lines)
