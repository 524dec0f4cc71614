"""How a tensor of a source checkpoint lies in the parameters that it fills: as it is, transposed, or several in one.

A layout knows the shape that it expects from the shapes of the parameters, so that a plan is checked before anything
is read. Parameters of a `Linear` are [in, out], those of torch are [out, in].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

Shape = tuple[int, ...]


@runtime_checkable
class Layout(Protocol):
    """The way from a source tensor to the parameters that it fills."""

    def source_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the tensor that fills parameters of the given shapes."""
        ...

    def pieces(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        """One array for each parameter, of its shape; views where that is possible."""
        ...


@dataclass(frozen=True)
class Same:
    """The parameter as it is."""

    def source_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        return shape

    def pieces(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        return (tensor,)


@dataclass(frozen=True)
class Transposed:
    """The parameter's last two dimensions swapped: the weight of a torch `Linear`, or a stack of such weights."""

    def source_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        return _swap(shape)

    def pieces(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        return (tensor.swapaxes(-1, -2),)


@dataclass(frozen=True)
class OutputFirst:
    """The parameter's last dimension in front: the weight of a torch convolution, [out, in, ...]."""

    def source_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        return (shape[-1], *shape[:-1])

    def pieces(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        return (np.moveaxis(tensor, 0, -1),)


@dataclass(frozen=True)
class Joined:
    """Several parameters one behind the other along their output dimension, which is their last.

    Attributes:
        transposed: whether the tensor is a torch `Linear`'s weight, [out, in], or a stack of such weights; biases are
            the same either way.
    """

    transposed: bool = True

    def source_shape(self, shapes: Sequence[Shape]) -> Shape:
        joined = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        return _swap(joined) if self.transposed else joined

    def pieces(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        ends = np.cumsum([shape[-1] for shape in shapes])[:-1]
        swapped = self.transposed and tensor.ndim > 1
        return np.split(tensor.swapaxes(-1, -2) if swapped else tensor, ends, axis=-1)


@dataclass(frozen=True)
class JoinedByHead:
    """Several torch `Linear`s' weights or biases in one, head by head: the first head's part of each, then the next's.

    Attributes:
        heads: how many each of them has.
    """

    heads: int

    def source_shape(self, shapes: Sequence[Shape]) -> Shape:
        return JOINED.source_shape(shapes)

    def pieces(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        ends = np.cumsum([shape[-1] // self.heads for shape in shapes])[:-1]
        by_head = tensor.T.reshape(*shapes[0][:-1], self.heads, -1)
        parts = np.split(by_head, ends, axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


SAME, TRANSPOSED, OUTPUT_FIRST = Same(), Transposed(), OutputFirst()
JOINED, JOINED_UNTRANSPOSED = Joined(), Joined(transposed=False)


def _swap(shape: Shape) -> Shape:
    """The shape with its last two dimensions swapped, where it has two."""
    return (*shape[:-2], *shape[-1:], *shape[-2:-1])
