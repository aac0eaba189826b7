"""A block map and a head's sizes -> how much memory attention's forward pass would move, beside dense attention.

After FlashAttention's Theorem 2 and Proposition 4: with N tokens, heads of d and a fast memory of M elements, attention
that keeps its scores there moves Θ(N²d²/M) elements, block-sparse attention Θ(Nd + N²d²/M · s) where s is the
fraction of tiles visited, and attention that stores its scores Θ(Nd + N²). The constants here are those of this count:

    fused(s)  =  queries · (d + dv)  +  s · blocks · keys · (d + dv)      blocks = queries / (M / 2(d + dv)), at least 1
    stored    =  queries · (d + dv)  +  keys · (d + dv)  +  4 · queries · keys

Fast memory holds a block each of queries, keys, values and outputs, as in algorithm 1; queries and outputs move once,
and keys and values once for each block of queries that visits their tile. Stored scores are written and read twice.

Source: Dao et al., FlashAttention, 2022, theorem 2, proposition 4 and algorithms 0 to 2.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from maskflash.analysis.block_map import BlockMap
from maskflash.ground import arguments
from maskflash.ground.units import in_bytes

__all__ = ["FAST_BYTES", "Traffic", "predict"]

FAST_BYTES: Final = 192 * 1024  # of a multiprocessor of the A100, the paper's example


def __dir__() -> list[str]:
    """What users may use."""
    return sorted(__all__)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Predicted bytes between slow and fast memory, for the forward pass of one head of one batch row.

    Attributes:
        block_sparse: visiting the map's tiles alone.
        fused: visiting all tiles (FlashAttention).
        stored: keeping the scores in slow memory (standard attention).
        visited: fraction of tiles visited, the s of the formula.
        fast_bytes: size of the fast memory, the M of the formula in bytes.
    """

    block_sparse: int
    fused: int
    stored: int
    visited: float
    fast_bytes: int

    def to_dict(self) -> dict[str, float]:
        """The same as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        fused, stored = (f"{in_bytes(n)} ({n / max(self.block_sparse, 1):.1f}x)" for n in (self.fused, self.stored))
        return f"{in_bytes(self.block_sparse)}; dense {fused}, dense with stored scores {stored}"


def predict(
    block_map: BlockMap,
    *,
    head_dim: int = 64,
    v_head_dim: int | None = None,
    itemsize: int = 2,
    fast_bytes: int = FAST_BYTES,
) -> Traffic:
    """Predict what a forward pass under this map moves.

    It is a model for comparing masks with dense attention: it knows no caches, no other heads in the same memory, no
    vectors or tables of the mask, and not how a kernel orders its work. A map of several batch rows or heads counts
    with its average.

    Args:
        block_map: which tiles are visited.
        head_dim: of queries and keys.
        v_head_dim: of values; None for head_dim.
        itemsize: bytes of an element.
        fast_bytes: of the fast memory: a GPU's shared memory for a block, a CPU core's second-level cache.

    Raises:
        ArgumentError: a size below 1.

    Example:
        >>> import maskflash as mf
        >>> found = predict(mf.sliding_window(512).block_map(8192, 8192))
        >>> round(found.fused / found.block_sparse, 1), round(found.visited, 3)
        (8.5, 0.076)
    """
    arguments.instance("predict", "block_map", block_map, BlockMap, "make one with mask.block_map")
    sizes = {"head_dim": head_dim, "itemsize": itemsize, "fast_bytes": fast_bytes}
    for name, value in sizes.items():
        arguments.integer("predict", name, value, low=1)
    width = head_dim + arguments.integer("predict", "v_head_dim", head_dim if v_head_dim is None else v_head_dim, low=1)
    rows, columns, visited = block_map.q_len, block_map.kv_len, 1 - block_map.sparsity
    blocks = max(1.0, rows * 2 * width * itemsize / fast_bytes)
    once, again = rows * width, blocks * columns * width
    return Traffic(
        block_sparse=round(itemsize * (once + visited * again)),
        fused=round(itemsize * (once + again)),
        stored=itemsize * (once + columns * width + 4 * rows * columns),
        visited=visited,
        fast_bytes=fast_bytes,
    )
