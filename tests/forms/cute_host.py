"""A mask function run by CuTe itself on the CPU, pair by pair; needs nvidia-cutlass-dsl, but no GPU."""

from typing import NamedTuple

import torch


class Aux(NamedTuple):
    """As FlashAttention 4 hands on what a function reads."""

    tensors: tuple
    scalars: tuple | None


def computed(form, shape):
    """(B, H, q_len, kv_len) bool."""
    import cutlass  # here, since this module is imported where the package is missing too
    from cutlass import cute
    from cutlass.cute.runtime import from_dlpack

    mask_mod = form.function()

    def ssa(number):
        held = cute.make_rmem_tensor(1, cutlass.Int32)
        held[0] = number
        return held.load()

    @cute.jit
    def run(out: cute.Tensor, aux: Aux):
        for b in cutlass.range(out.shape[0]):
            for h in cutlass.range(out.shape[1]):
                for q in cutlass.range(out.shape[2]):
                    for kv in cutlass.range(out.shape[3]):
                        if cutlass.const_expr(aux.scalars is not None):
                            seen = mask_mod(ssa(b), ssa(h), ssa(q), ssa(kv), None, aux.tensors, aux.scalars)
                        else:
                            seen = mask_mod(ssa(b), ssa(h), ssa(q), ssa(kv), None, aux.tensors)
                        out[b, h, q, kv] = cutlass.Int8(cutlass.Boolean(seen[0]))

    out = torch.full(shape, -1, dtype=torch.int8)
    given = from_dlpack(out), Aux(tuple(from_dlpack(table) for table in form.aux_tensors), form.aux_scalars())
    cute.compile(run, *given)(*given)
    assert int(out.min()) >= 0
    return out.bool()
