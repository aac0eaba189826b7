"""Masks of tokens that are points of a line, an image or a video: each sees the points near its own.

Tokens are in row-major order: of a video frame by frame, row by row. Pictures show queries downwards and keys to the
right; ■ is visible.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from maskflash.errors import ArgumentError
from maskflash.ground import arguments
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import Predicate

__all__ = ["neighborhood", "sliding_tiles"]

Near = Callable[[Any, Any], Any]


def neighborhood(
    shape: int | tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
) -> Mask:
    """Neighbourhood attention in one, two or three dimensions: along each, a kernel around the query's coordinate.

        visible = along each axis, i in the kernel of the query's coordinate
        kernel  = first <= i < first + kernel_size,  first = clamp(c - kernel_size // 2, 0, size - kernel_size)
        causal  = c - kernel_size < i <= the query's coordinate
        c       = the query's coordinate; with a stride, that of the leader of its group of `stride` queries

        ■ · ■ · · · · ·    shape=8, kernel_size=2, dilation=2: each axis falls into `dilation` axes of every
        · ■ · ■ · · · ·    dilation-th coordinate, and each of these has its own edges
        ■ · ■ · · · · ·
        · ■ · ■ · · · ·
        · · ■ · ■ · · ·
        · · · ■ · ■ · ·
        · · · · ■ · ■ ·
        · · · · · ■ · ■

    At the edges the kernel is shifted inwards, so that all queries see as many keys; a causal one is cut off there.
    Tokens after the grid see nothing and nobody sees them; join others with `|`.

    Args:
        shape: points along each axis: (length,), (height, width) or (frames, height, width); an int is (length,).
        kernel_size: points of the neighbourhood along each axis, an int for all axes; odd to centre it.
        stride: neighbouring queries that share a kernel, at most kernel_size.
        dilation: the kernel takes every dilation-th point; kernel_size times dilation is at most the axis' size.
        is_causal: whether nothing ahead is seen along an axis, such as (True, False, False) for a video.

    Raises:
        ArgumentError: sizes that don't fit one another, or arguments for another number of axes.

    Source: Hassani et al., Generalized Neighborhood Attention, 2025 (arXiv 2504.16922); NATTEN 0.21, whose arguments
    these are (`na1d`, `na2d`, `na3d`).
    """
    points = _axes("neighborhood", "shape", shape)
    given = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    kernels, strides, dilations = (_along("neighborhood", name, value, len(points)) for name, value in given.items())
    causal = is_causal if isinstance(is_causal, (tuple, list)) else (is_causal,) * len(points)
    _refuse_other("neighborhood", "is_causal", causal, len(points))
    causal = tuple(arguments.flag("neighborhood", "is_causal", each) for each in causal)
    for size, kernel, step, every in zip(points, kernels, strides, dilations, strict=True):
        if kernel * every > size or step > kernel:
            raise ArgumentError(
                f"neighborhood: an axis of {size} has kernel_size {kernel}, stride {step} and dilation {every}, "
                "expected stride <= kernel_size and kernel_size * dilation <= the axis' size"
            )
    near = [_axis(*each) for each in zip(points, kernels, strides, dilations, causal, strict=True)]
    tokens, inside = math.prod(points), _grid(points, near)
    said = {"kernel_size": kernels, "stride": strides, "dilation": dilations, "is_causal": causal}
    plain = {"stride": 1, "dilation": 1, "is_causal": False}
    told = [f"{name}={value}" for name, value in said.items() if set(value) != {plain.get(name)}]
    return Predicate(
        lambda b, h, q, kv: 0 <= q < tokens and inside(q, kv), f"neighborhood({points}, {', '.join(told)})"
    )


def sliding_tiles(shape: tuple[int, ...], cube: tuple[int, ...], kernel_size: int | tuple[int, ...]) -> Mask:
    """Sliding tile attention: a video is cut into cubes of tokens, and each cube sees the whole cubes near its own.

        visible = cube of kv in the kernel around the cube of q, along each axis as `neighborhood` has it

        ■ ■ ■ ■ · · · ·    shape=(4, 2), cube=(1, 2): cubes of a row of an image; kernel_size=(2, 1) of them
        ■ ■ ■ ■ · · · ·
        ■ ■ ■ ■ · · · ·
        ■ ■ ■ ■ · · · ·
        · · ■ ■ ■ ■ · ·
        · · ■ ■ ■ ■ · ·
        · · · · ■ ■ ■ ■
        · · · · ■ ■ ■ ■

    Tokens are in the order of cubes: those of the first cube, then those of the next, cubes in row-major order. So
    cubes of as many tokens as a tile has make every tile full or skip. Where kernels are odd, tokens in row-major order
    see the same by `neighborhood(shape, kernel_size times cube, stride=cube)`. Tokens after the grid see nothing and
    nobody sees them.

    Args:
        shape: points along each axis: (frames, height, width), or fewer.
        cube: points of a cube along each axis, which divide the shape. The paper calls a cube a tile.
        kernel_size: cubes of the neighbourhood along each axis, an int for all axes; odd to centre it, as the paper's.

    Raises:
        ArgumentError: cubes that don't divide the shape, or more of them than there are in a kernel.

    Source: Zhang et al., Fast Video Generation with Sliding Tile Attention, 2025 (arXiv 2502.04507).
    """
    points = _axes("sliding_tiles", "shape", shape)
    sides, kernels = (
        _along("sliding_tiles", name, value, len(points))
        for name, value in (("cube", cube), ("kernel_size", kernel_size))
    )
    if any(size % side for size, side in zip(points, sides, strict=True)):
        raise ArgumentError(f"sliding_tiles: shape is {points}, expected multiples of cube, {sides}; pad the grid")
    cubes = tuple(size // side for size, side in zip(points, sides, strict=True))
    if any(kernel > count for kernel, count in zip(kernels, cubes, strict=True)):
        raise ArgumentError(f"sliding_tiles: kernel_size is {kernels}, expected at most the cubes of the grid, {cubes}")
    tokens, each, inside = math.prod(points), math.prod(sides), kernels_of(cubes, kernels)
    return Predicate(
        lambda b, h, q, kv: 0 <= q < tokens and inside(q // each, kv // each),
        f"sliding_tiles({points}, cube={sides}, kernel_size={kernels})",
    )


def kernels_of(points: tuple[int, ...], kernels: tuple[int, ...]) -> Near:
    """Whether a key is in the kernel around a query, each counted in row-major order; no key after the grid is."""
    return _grid(points, [_axis(size, kernel, 1, 1, False) for size, kernel in zip(points, kernels, strict=True)])


def _axis(size: int, kernel: int, stride: int, dilation: int, causal: bool) -> Near:
    """Whether the key's coordinate j is in the kernel of the query's, i, along an axis; j may be beyond its end."""
    half, shift = kernel // 2, stride - 1 if causal else stride // 2
    end = size - 1

    def led(i: Any, last: Any) -> Any:
        return min(i // stride * stride + shift, last)

    def own(i: Any, last: Any) -> Any:
        return i

    leader = led if stride > 1 else own

    def shifted(i: Any, j: Any, last: Any) -> Any:
        first = min(max(leader(i, last) - half, 0), last - kernel + 1)
        return first <= j < first + kernel

    def behind(i: Any, j: Any, last: Any) -> Any:
        return leader(i, last) - kernel < j <= i

    near = behind if causal else shifted
    if dilation == 1:
        return lambda i, j: near(i, j, end)
    return lambda i, j: (
        i % dilation == j % dilation and near(i // dilation, j // dilation, (end - i % dilation) // dilation)
    )


def _grid(points: tuple[int, ...], near: list[Near]) -> Near:
    """Whether a key is near a query along all axes; a key after the grid is beyond the first axis' end."""
    *before, last = near
    if not before:
        return last
    width, rest = points[-1], _grid(points[:-1], before)
    return lambda q, kv: rest(q // width, kv // width) and last(q % width, kv % width)


def _axes(operation: str, name: str, value: Any) -> tuple[int, ...]:
    """The sizes of one to three axes, whose points are tokens."""
    given = value if isinstance(value, (tuple, list)) else (value,)
    if not 1 <= len(given) <= 3:
        raise ArgumentError(f"{operation}: {name} is {value!r}, expected sizes of one to three axes")
    points = tuple(arguments.length(operation, name, each, low=1) for each in given)
    if math.prod(points) > arguments.MOST_TOKENS:
        raise ArgumentError(f"{operation}: {name} is {points}, expected at most {arguments.MOST_TOKENS:,} points")
    return points


def _along(operation: str, name: str, value: Any, axes: int) -> tuple[int, ...]:
    """A positive int for each axis, of one for each or one for all."""
    given = value if isinstance(value, (tuple, list)) else (value,) * axes
    _refuse_other(operation, name, given, axes)
    return tuple(arguments.length(operation, name, each, low=1) for each in given)


def _refuse_other(operation: str, name: str, given: Any, axes: int) -> None:
    if len(given) != axes:
        raise ArgumentError(
            f"{operation}: {name} is {tuple(given)!r}, expected {axes} of them, one for each axis of shape"
        )
