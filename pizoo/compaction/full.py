"""The net that is to be compacted: what it gives, computed once, and the small nets fitted to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from pizoo.compaction.fit import check_inputs, fit_rows, in_parts, relative_error
from pizoo.data import epoch_order
from pizoo.evaluation.accuracy import accuracy
from pizoo.models import InfPiMLP
from pizoo.models.adapt import check_pixels
from pizoo.nn import InfPiLinear, check_positive

ROWS = 8000
READOUT = "output"
READOUT_SHARE = 2  # a read-out does with fewer rows
VIEWS = 6
SHIFT = 0.1  # of an image's side: how far a view is moved, at most
HELD_OUT = 0.1
ROWS_DTYPE = torch.int8
SAMPLES_AT_ONCE = 500

T = TypeVar("T")


def compact(
    model: InfPiMLP,
    x: Tensor,
    rows: int | Sequence[int] = ROWS,
    *,
    dtype: torch.dtype = ROWS_DTYPE,
    views: int = VIEWS,
    seed: int = 0,
    progress: bool = False,
) -> InfPiMLP:
    """A net of few rows that computes what ``model`` does; it trains and grows on like any other.

    Input layer and biases stay, the input layer rounded to float16. Each growing layer, on top of the small ones below it,
    gets landmarks and an ``A`` by ridge regression on what the full layer gives (:mod:`pizoo.compaction.fit`). A read-out that
    gives nothing, as a few-shot net's, which is adapted to each task, stays too: the features it takes are what counts.

    Args:
        model: the net; its device is where all is computed, wherever its rows are (``rows_on``).
        x: its training inputs, as it takes them, [n, d] or images [n, C, H, W], on any device (of characters to draw tasks
            from, :meth:`pizoo.data.TaskPool.samples`).
        rows: of each hidden layer, with half as many for the read-out; or one number per growing layer that gives anything.
        dtype: of the rows: int8, of which twice as many fit a file, or float16.
        views: of each image to fit to: itself, its mirror image, others also moved a little. The full net answers on
            those as on images it has not met, and it takes that many times as long to ask it. Vectors have one view.
        seed: of held-out inputs, views and landmarks: one seed, machine and version of torch give one net.
        progress: show progress bars.

    Returns:
        the net in eval mode. Its ``compacted`` says what it was made of, and how well it agrees with the
        full net on a tenth of x that nothing was fitted to.

    Raises:
        TypeError: ``model`` is no InfPiMLP, x no tensor.
        ValueError: x of another shape than the net takes, or of other pixels; more rows than the net has, or than there are
            inputs.
    """
    check_rows(rows, model, x, views)
    check_pixels(model, x, "x")
    return Full(model, x, views=views, seed=seed, progress=progress).fit(rows, dtype)


class Full:
    """A net to be compacted, and what each of its layers gives: computed once, for nets of any number of sizes.

    Args:
        model, x, views, seed, progress: as for :func:`compact`.
        normalize: turns x into what the net takes; None: it is that already.
        test_x: inputs to measure on; nothing is fitted to them.

    Attributes:
        counts: rows of each growing layer that gives anything, by name.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: InfPiMLP,
        x: Tensor,
        normalize: Callable[[Tensor], Tensor] | None = None,
        test_x: Tensor | None = None,
        views: int = VIEWS,
        seed: int = 0,
        progress: bool = False,
    ):
        self.counts, _ = sizes_of(model, x, views)
        self.seed, self.progress, self.net = seed, progress, without_rows(model)
        held_out, order = _held_out(x), epoch_order(len(x), seed, 0)
        fit_views = range(views if x.ndim == 4 else 1)
        parts = {"fit": [(x, order[held_out:], view) for view in fit_views], "held out": [(x, order[:held_out], 0)]}
        if test_x is not None:
            parts["test"] = [(test_x, torch.arange(len(test_x)), 0)]
        sizes = [sum(len(index) for _, index, _ in pieces) for pieces in parts.values()]
        entering, exact = self._through_input_layers(model, chain(*parts.values()), normalize)
        # By part: what enters the first growing layer of the small nets, what each growing layer of the full net gives.
        self.entering: dict[str, Tensor] = dict(zip(parts, entering.split(sizes), strict=True))
        self.outputs: dict[str, list[Tensor]] = {part: [] for part in parts}
        for name, layer in giving(model).items():
            what = f"full net, {name}"
            exact = in_parts(layer, exact, lambda parts, what=what: self._track(parts, what, len(parts)))
            for part, out in zip(parts, exact.split(sizes), strict=True):
                self.outputs[part].append(out)

    def _through_input_layers(self, model: InfPiMLP, pieces: Iterable, normalize) -> tuple[Tensor, Tensor]:
        """All inputs after the small nets' input layer and after the full net's, float32 [n, r]."""
        layers, found = (self.net.input, model.input), ([], [])
        generator = torch.Generator().manual_seed(self.seed)
        for x, index, view in pieces:
            for batch in index.split(SAMPLES_AT_ONCE):
                part = x[batch.to(x.device)].to(model.input.A.device)
                part = part if normalize is None else normalize(part)
                part = model.flatten(_seen(part, view, generator))
                for layer, outputs in zip(layers, found, strict=True):
                    outputs.append(layer(part.to(layer.A.dtype)).float())
        return torch.cat(found[0]), torch.cat(found[1])

    @torch.no_grad()
    def fit(self, rows: int | Sequence[int], dtype: torch.dtype = ROWS_DTYPE) -> InfPiMLP:
        """The small net; see :func:`compact`."""
        counts = row_counts(rows, self.counts)
        net, g, fits = copy.deepcopy(self.net), self.entering, {}
        for layer in net.growing_layers.values():
            layer.to_rows_dtype(dtype)
        names = self._track(self.counts, f"{sum(counts):,} rows", len(counts))
        for i, (name, count) in enumerate(zip(names, counts, strict=True)):
            layer = net.growing_layers[name]
            fit, held_out = ((g[part], self.outputs[part][i]) for part in ("fit", "held out"))
            fits[name] = fit_rows(layer, count, fit, held_out, self.seed)
            g = {part: in_parts(layer, inputs) for part, inputs in g.items()}
        net.compacted = {
            "rows": dict(zip(self.counts, counts, strict=True)),
            "full_rows": self.counts,
            "seed": self.seed,
            "fits": {name: fit._asdict() for name, fit in fits.items()},
            "held_out": self.measure(net, "held out"),
        }
        return net

    def output(self, part: str) -> Tensor:
        """The full net's logits [n, classes], or its features [n, r] if its read-out gives nothing.

        ``part`` is "fit", "held out" or "test".
        """
        return self.outputs[part][-1]

    @torch.no_grad()
    def output_of(self, net: InfPiMLP, part: str) -> Tensor:
        """The same of a net that :meth:`fit` gave."""
        g = self.entering[part]
        for name in self.counts:
            g = in_parts(net.growing_layers[name], g)
        return g

    def measure(self, net: InfPiMLP, part: str, y: Tensor | None = None) -> dict[str, float]:
        """How well a net of :meth:`fit` agrees with the full net (:func:`agreement`).

        If the read-out gives nothing: the relative error of the features.
        """
        found, wanted = self.output_of(net, part), self.output(part)
        return (
            agreement(found, wanted, y) if READOUT in self.counts else {"features_error": relative_error(found, wanted)}
        )

    def _track(self, sequence: Iterable[T], what: str, total: int) -> Iterable[T]:
        from rich.progress import track

        return track(sequence, what, total, disable=not self.progress)


def agreement(found: Tensor, wanted: Tensor, y: Tensor | None = None) -> dict[str, float]:
    """How near logits [n, classes] come to those wanted: percent of equal predictions, relative error; with labels y [n] also
    their accuracy."""
    near = {"agreement": accuracy(found, wanted.argmax(1)), "logits_error": relative_error(found, wanted)}
    return near if y is None else {**near, "accuracy": accuracy(found, y)}


def _seen(images: Tensor, view: int, generator: torch.Generator) -> Tensor:
    """A view of images [n, C, H, W]: 0: themselves, 1: mirrored, else moved, edges repeated, mirrored or not."""
    if view >= 2:
        height, width = images.shape[-2:]
        up, left = (max(1, round(SHIFT * side)) for side in (height, width))
        i, j = (int(torch.randint(2 * room + 1, (), generator=generator)) for room in (up, left))
        padded = torch.nn.functional.pad(images, (left, left, up, up), mode="replicate")
        images = padded[..., i : i + height, j : j + width]
    mirrored = view == 1 or (view >= 2 and bool(torch.randint(2, (), generator=generator)))
    return images.flip(-1) if mirrored else images


def _held_out(x: Tensor) -> int:
    return max(1, round(HELD_OUT * len(x)))


def giving(model: InfPiMLP) -> dict[str, InfPiLinear]:
    """The growing layers of ``model`` by name, without a read-out whose rows give nothing."""
    return {name: layer for name, layer in model.growing_layers.items() if name != READOUT or layer.amult.any()}


def sizes_of(model: InfPiMLP, x: Tensor, views: int) -> tuple[dict[str, int], int]:
    """How many rows each growing layer that gives anything has, by name, and how many inputs there are to fit fewer to.

    Raises:
        TypeError: ``model`` is no InfPiMLP, x no tensor.
        ValueError: a net without such a layer, fewer than two inputs, no view.
    """
    if not isinstance(model, InfPiMLP):
        raise TypeError(f"model is a {type(model).__name__}; only an InfPiMLP has rows to make fewer of")
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a tensor of the net's training inputs")
    counts = {name: layer.count for name, layer in giving(model).items()}
    if not counts:
        raise ValueError("model has no growing layer but a read-out that gives nothing: there is nothing to compact")
    if len(x) < 2:
        raise ValueError(f"x has shape {list(x.shape)}; it must hold at least two inputs: one of them is held out")
    check_positive(views=views)
    inputs = (len(x) - _held_out(x)) * (views if x.ndim == 4 else 1)
    return counts, inputs


def check_rows(rows: int | Sequence[int], model: InfPiMLP, x: Tensor, views: int) -> None:
    """Raise what :func:`compact` would after asking the full net, which takes long, before."""
    counts, inputs = sizes_of(model, x, views)
    check_inputs(max(row_counts(rows, counts)), inputs)


def row_counts(rows: int | Sequence[int], full: Mapping[str, int]) -> list[int]:
    """How many rows each growing layer gets (:func:`compact`), of the ``full`` ones by name.

    Raises:
        ValueError: not one number, nor one for each layer; none, or more than there are.
    """
    if isinstance(rows, int):
        rows = [max(1, rows // share) if share > 1 else rows for share in shares(full)]
    if len(rows) != len(full):
        raise ValueError(f"rows is {list(rows)}; it must be one number, or one for each of {', '.join(full)}")
    for (name, most), count in zip(full.items(), rows, strict=True):
        check_positive(**{f"rows of {name}": count})
        if count > most:
            raise ValueError(f"rows is {count:,} for {name}, which has {most:,}: there is nothing to compact")
    return list(rows)


def shares(names: Collection[str]) -> list[int]:
    """By how much each of these layers has fewer rows than a hidden one: a read-out, where it is not the only one."""
    return [READOUT_SHARE if name == READOUT and len(names) > 1 else 1 for name in names]


@torch.no_grad()
def without_rows(model: InfPiMLP) -> InfPiMLP:
    """A net like ``model`` with its input layer (rounded to float16) and biases, and initial rows; with its read-out, if that
    gives nothing."""
    with torch.random.fork_rng(devices=[]):
        net = InfPiMLP(**model.hparams, dtype=torch.float32).to(model.input.A.device)
    net.input.A.copy_(model.input.A.half())
    for layer, full in zip(
        (net.input, *net.growing_layers.values()), (model.input, *model.growing_layers.values()), strict=True
    ):
        if full.bias is not None:
            layer.bias.copy_(full.bias)
    if READOUT not in giving(model):
        net.output.load_state_dict(model.output.state_dict())
    return net.eval()
