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
    """The parameter's dimensions in reverse order: the weight of a torch `Linear`."""

    def source_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        return shape[::-1]

    def pieces(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        return (tensor.T,)


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
        transposed: whether the tensor is a torch `Linear`'s weight, [out, in]; biases are the same either way.
    """

    transposed: bool = True

    def source_shape(self, shapes: Sequence[Shape]) -> Shape:
        joined = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        return joined[::-1] if self.transposed else joined

    def pieces(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        ends = np.cumsum([shape[-1] for shape in shapes])[:-1]
        return np.split(tensor.T if self.transposed else tensor, ends, axis=-1)


SAME, TRANSPOSED, OUTPUT_FIRST = Same(), Transposed(), OutputFirst()
JOINED, JOINED_UNTRANSPOSED = Joined(), Joined(transposed=False)
