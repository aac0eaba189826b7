"""A statement -> what it does: the table of all instructions that are known here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tests.ptx import access, arithmetic, products, warps
from tests.ptx.faults import Unsupported
from tests.ptx.operands import Action, Scope
from tests.ptx.parse import Statement

INSTRUCTIONS: Final[dict[str, Callable[[Statement, Scope], Action]]] = {
    **dict.fromkeys(arithmetic.OPERATIONS, arithmetic.build),
    "mov": arithmetic.build_mov,
    "ld": access.build_ld,
    "st": access.build_st,
    "atom": access.build_atom,
    "cp.async": access.build_cp_async,
    "cp.async.commit_group": access.build_commit,
    "cp.async.wait_group": access.build_wait,
    "cp.async.wait_all": access.build_wait_all,
    "ldmatrix": access.build_ldmatrix,
    "stmatrix": access.build_stmatrix,
    "bar.sync": warps.build_barrier,
    "barrier.sync": warps.build_barrier,
    "bar.warp.sync": warps.build_warp_barrier,
    "fence.proxy.async": warps.build_proxy_fence,
    "shfl.sync": warps.build_shuffle,
    "vote.sync.ballot": warps.build_ballot,
    "mma.sync": products.build_mma,
    "wgmma.mma_async": products.build_wgmma,
    "wgmma.fence": products.build_wgmma_fence,
    "wgmma.commit_group": products.build_wgmma_commit,
    "wgmma.wait_group": products.build_wgmma_wait,
}


def build(statement: Statement, scope: Scope) -> Action:
    """What a statement does.

    Raises:
        Unsupported: the instruction, or this form of it, is not known; the message has its name.
    """
    words = statement.words
    names = (".".join(words[:count]) for count in range(len(words), 0, -1))
    known = next((name for name in names if name in INSTRUCTIONS), None)
    try:
        if known is None:
            raise Unsupported("an unknown instruction")
        return INSTRUCTIONS[known](statement, scope)
    except (Unsupported, IndexError, ValueError) as error:
        place = scope.program.place(statement)
        raise Unsupported(f"{'.'.join(words)}: {error}\n    at {place}") from error
