"""A few lines of PTX and a number for each thread -> what they leave in a register: single instructions in tests."""

from __future__ import annotations

import numpy as np

from tests.ptx.global_memory import Buffer
from tests.ptx.machine import Kernel
from tests.ptx.orders import TEXT, Order
from tests.ptx.values import Array, size_of

PREFIXES = {2: "%rs", 4: "%r", 8: "%rd"}
_MODULE = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet({params})
.reqntid {threads}
.maxnreg {registers}
{{
    .reg .pred %p<100>;
    .reg .b16 %rs<100>;
    .reg .b32 %r<400>;
    .reg .b64 %rd<400>;
    .loc 1 1 0 // snippet.py:1:0
    {lines}
    ret;
}}
"""


def kernel(lines: list[str], params: int, threads: int, registers: int = 128) -> Kernel:
    """A kernel of these lines, with so many tensors as parameters p0, p1, ..."""
    declared = "\n" + ",\n".join(f"    .param .u64 .ptr .global .align 1 p{n}" for n in range(params)) + "\n"
    return Kernel.of(_MODULE.format(params=declared, threads=threads, registers=registers, lines="\n".join(lines)))


def buffer(name: str, array: Array, **options: bool) -> Buffer:
    """An array as a tensor of a kernel; it must be kept alive."""
    strides = tuple(step // array.itemsize for step in array.strides)
    return Buffer(name, array.ctypes.data, array.shape, strides, array.itemsize, **options)


def launch(
    lines: list[str], *arrays: Array, threads: int = 32, shared: int = 0, grid: int = 1, order: Order = TEXT
) -> None:
    """Run lines on arrays; parameter pN is the address of the N-th."""
    buffers = [buffer(f"p{n}", array) for n, array in enumerate(arrays)]
    kernel(lines, len(arrays), threads).launch(grid, buffers, shared, order)


def value_of(body: str, *inputs: Array, out: str = "b32", shared: int = 0) -> Array:
    """What `body` leaves in %r0, %rs0, %rd0 or %p0, by the type `out`, as unsigned numbers.

    A thread has its number of each input in %r1, %r2, ... (or %rs, %rd, by size); its own number in %r99, 8 times that
    in %rd98. `inputs` are arrays of unsigned numbers, one for each thread.
    """
    threads = len(inputs[0]) if inputs else 32
    lines = ["mov.u32 %r99, %tid.x;", "mul.wide.u32 %rd98, %r99, 8;"]
    arrays = [np.zeros(threads, np.uint64)]
    for n, given in enumerate(inputs, 1):
        register = f"{PREFIXES[given.itemsize]}{n}"
        lines += [f"ld.param.b64 %rd97, [p{n}];", "add.s64 %rd97, %rd97, %rd98;"]
        lines += [f"ld.global.b{8 * given.itemsize} {register}, [%rd97];"]
        spread = np.zeros((threads, 8 // given.itemsize), given.dtype)
        spread[:, 0] = given
        arrays.append(spread)
    lines += [line.strip() for line in body.strip().splitlines()]
    size = size_of(out) or 4
    if out == "pred":
        lines.append("selp.b32 %r0, 1, 0, %p0;")
    register = f"{PREFIXES[size]}0"
    lines += ["ld.param.b64 %rd97, [p0];", "add.s64 %rd97, %rd97, %rd98;"]
    lines += [f"cvt.u64.u{8 * size} %rd96, {register};" if size < 8 else f"mov.b64 %rd96, {register};"]
    lines += ["st.global.b64 [%rd97], %rd96;"]
    launch(lines, *arrays, threads=threads, shared=shared)
    return arrays[0].astype(f"u{size}")
