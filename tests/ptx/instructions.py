"""A statement -> what it does: the table of all instructions that are known here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tests.ptx import access, arithmetic, bulk, products, waits, warps
from tests.ptx.faults import Unsupported
from tests.ptx.operands import Action, Scope, Waiting
from tests.ptx.parse import Statement

INSTRUCTIONS: Final[dict[str, Callable[[Statement, Scope], Action | Waiting]]] = {
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
    "bar.sync": waits.build_barrier,
    "barrier.sync": waits.build_barrier,
    "cp.async.bulk.tensor": bulk.build_tensor,
    "cp.async.bulk.commit_group": bulk.build_commit,
    "cp.async.bulk.wait_group": bulk.build_wait,
    "mbarrier.init": waits.build_init,
    "mbarrier.inval": waits.build_inval,
    "mbarrier.arrive": waits.build_arrive,
    "mbarrier.expect_tx": waits.build_arrive,
    "mbarrier.try_wait": waits.build_wait,
    "mbarrier.test_wait": waits.build_wait,
    "setmaxnreg": waits.build_setmaxnreg,
    "elect.sync": warps.build_elect,
    "fence.mbarrier_init": warps.build_mbarrier_fence,
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
# Warps of which no thread may be elsewhere.
TOGETHER: Final[dict[str, int]] = {
    **dict.fromkeys(("bar", "barrier", "shfl", "vote", "elect", "ldmatrix", "stmatrix", "mma", "setmaxnreg"), 1),
    "wgmma": 4,
}


def build(statement: Statement, scope: Scope) -> Action | Waiting:
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
