"""Few-shot tasks, drawn from classes of images that stay on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pizoo.data.dataset import TASKS, TEST_TASKS, random_state

Uniform = Callable[[tuple[int, ...]], Tensor]
ROTATIONS = 4
INK = 1 / 255


@dataclass(frozen=True)
class FewShotBatch:
    """T tasks of N support and Q query samples, on one device.

    Args:
        support_x: [T, N, d], as the net takes them.
        support_y: labels int64 [T, N], 0 to ways - 1.
        query_x: [T, Q, d].
        query_y: int64 [T, Q].

    Raises:
        ValueError: shapes or dtypes that do not fit. Labels out of a net's range are found by whoever uses them.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def __post_init__(self) -> None:
        for part, x, y in (("support", self.support_x, self.support_y), ("query", self.query_x, self.query_y)):
            if x.ndim != 3 or x.numel() == 0 or not x.is_floating_point():
                raise ValueError(
                    f"{part}_x has shape {list(x.shape)} and dtype {x.dtype}; it must be [T, n, d] of floats, none of them 0"
                )
            if y.dtype != torch.int64 or y.shape != x.shape[:2]:
                raise ValueError(
                    f"{part}_y has shape {list(y.shape)} and dtype {y.dtype}; it must be {list(x.shape[:2])} of torch.int64"
                )
        if self.support_x.shape[::2] != self.query_x.shape[::2]:
            shapes = f"{list(self.support_x.shape)} and {list(self.query_x.shape)}"
            raise ValueError(f"support_x and query_x have shapes {shapes}; they must agree in T and d")

    def __getitem__(self, tasks: slice) -> FewShotBatch:
        """Some of the tasks."""
        return FewShotBatch(*(part[tasks] for part in self._parts))

    def to(self, dtype: torch.dtype) -> FewShotBatch:
        """The batch with its samples in another dtype."""
        return replace(self, support_x=self.support_x.to(dtype), query_x=self.query_x.to(dtype))

    def split(self, size: int) -> Iterator[FewShotBatch]:
        """Batches of ``size`` tasks each, the last perhaps of fewer; views."""
        for parts in zip(*(part.split(size) for part in self._parts), strict=True):
            yield FewShotBatch(*parts)

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.support_x, self.support_y, self.query_x, self.query_y


@dataclass(frozen=True, eq=False)
class TaskPool:
    """Classes of images to draw tasks from.

    Args:
        name: what messages and results call it: a split, as in "test".
        images: [classes, drawings, C, H, W], uint8 (255 becomes 1) or floating point in [0, 1]; tasks are drawn on their
            device.

    Raises:
        ValueError: another shape or dtype, values outside [0, 1].
    """

    name: str
    images: Tensor

    def __post_init__(self) -> None:
        x = self.images
        if x.ndim != 5 or x.numel() == 0:
            raise ValueError(
                f"{self.name}: images have shape {list(x.shape)}; they must be [classes, drawings, C, H, W], none of them 0"
            )
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise ValueError(f"{self.name}: images have dtype {x.dtype}; it must be uint8 or floating point")
        if x.is_floating_point() and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                f"{self.name}: images have values from {x.min():g} to {x.max():g}; floating-point images lie in [0, 1]"
            )

    @property
    def input_size(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.images.shape[2:])

    def rotated(self) -> TaskPool:
        """The pool with every class turned by 0, 90, 180 and 270 degrees, as four classes."""
        turned = [torch.rot90(self.images, k, (3, 4)) for k in range(ROTATIONS)]
        return TaskPool(f"{self.name}_rotated", torch.cat(turned))

    def samples(self) -> Tensor:
        """All images as nets take them: [classes * drawings, C, H, W] float32 in [0, 1], class by class."""
        return _in_unit_range(self.images.flatten(0, 1))

    def to(self, device: torch.device | str) -> TaskPool:
        return replace(self, images=self.images.to(device))

    def check(self, ways: int, shots: int, queries: int) -> None:
        """Raise ValueError unless there are classes for ``ways`` and drawings for ``shots`` and ``queries``."""
        for key, value in (("ways", ways), ("shots", shots), ("queries", queries)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{key} is {value!r}; it must be an integer of at least 1")
        classes, drawings = self.images.shape[:2]
        if ways > classes:
            raise ValueError(f"ways is {ways}; {self.name} has {classes} classes, too few for a task")
        if shots + queries > drawings:
            raise ValueError(
                f"shots is {shots} and queries {queries}; {self.name} has {drawings} drawings a class, too few for both"
            )

    def draw(self, uniform: Uniform, count: int, ways: int = 5, shots: int = 1, queries: int = 1) -> FewShotBatch:
        """Draw ``count`` tasks: different classes, and of each different drawings to support and to query.

        Args:
            uniform: gives numbers in [0, 1) of a shape, on the images' device (:func:`device_uniform`,
                :func:`frozen_uniform`).
            ways: classes of a task. shots, queries: support and query images of each.

        Returns:
            pixels in [0, 1], float32, N = ways * shots and Q = ways * queries of them, class by class.

        Raises:
            ValueError: too few classes or drawings.
        """
        self.check(ways, shots, queries)
        total, drawings = self.images.shape[:2]
        classes = uniform((count, total)).topk(ways, dim=1).indices
        chosen = uniform((count, ways, drawings)).topk(shots + queries, dim=2).indices
        x = _in_unit_range(self.images[classes[..., None], chosen].flatten(3))
        labels = torch.arange(ways, device=x.device)[:, None]
        parts = []
        for part, n in zip(x.split([shots, queries], 2), (shots, queries), strict=True):
            parts += [part.flatten(1, 2), labels.expand(ways, n).flatten().expand(count, -1)]
        return FewShotBatch(*parts)


def _in_unit_range(images: Tensor) -> Tensor:
    """Pixels as nets take them, float32 in [0, 1]."""
    # A product is the same to the bit on every device; a quotient is not.
    return images.float() * INK if images.dtype == torch.uint8 else images.float()


def device_uniform(device: torch.device, seed: int, epoch: int) -> Uniform:
    """Random numbers made on the device, for training: a function of device, seed and epoch alone."""
    generator = torch.Generator(device)
    generator.manual_seed(int(random_state(TASKS, seed=seed, epoch=epoch).randint(2**31)))
    return lambda shape: torch.rand(shape, generator=generator, device=device)


def frozen_uniform(device: torch.device, seed: int) -> Uniform:
    """Random numbers that are the same on every device and under every version, for tasks that a number is measured on."""
    state = random_state(TEST_TASKS, seed=seed)
    return lambda shape: torch.from_numpy(state.random_sample(shape)).to(device)
