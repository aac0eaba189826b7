"""A mask and a plan of shards -> the attention op that each rank calls with its own tokens."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Literal, Never

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from maskflash import api
from maskflash.errors import ArgumentError, ArgumentTypeError, MaskIndexError
from maskflash.functions.fingerprint import contents
from maskflash.functions.sizes import Sizes
from maskflash.ground import arguments, qkv
from maskflash.ground.arguments import BlockSize
from maskflash.ground.identity import Watch, owner
from maskflash.ground.names import surplus, unexpected
from maskflash.masks.predicate import MaskLike
from maskflash.op import cache, later
from maskflash.op.asking import Asking, dropout_of
from maskflash.op.attention import Attention
from maskflash.op.parts import Tokens, of_tokens, part
from maskflash.op.spec import Spec
from maskflash.parallel import heads
from maskflash.parallel.agree import agree
from maskflash.parallel.attention import Assignment, Portion, attend
from maskflash.parallel.exchange import find_stages
from maskflash.parallel.heads import HeadExchange
from maskflash.parallel.needs import find_needs
from maskflash.parallel.peers import Ranks, find_ranks
from maskflash.parallel.routes import find_routes
from maskflash.parallel.shard_plan import ShardPlan
from maskflash.scores.score import ScoreLike

_OPERATION: Final = "parallel attention"
_FACTS: Final = (
    *("the plan", "the mask", "what its tables hold", "the score", "what tables of the score hold", "the shape"),
    *("sinks", "the dtype", "the scale", "dropout", "what asks for gradients", "the number of stages"),
)
_STAGES: Final = 2  # of keys that travel, where nobody asks for another number
_MOST: Final = 16  # works that are kept; the least recently used goes first


def compile(
    mask: MaskLike | Tensor,
    plan: ShardPlan,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    score: ScoreLike | None = None,
    scale: float | None = None,
    block_size: BlockSize = 128,
    backend: Literal["auto", "cpu", "triton"] = "auto",
    stages: int | None = None,
    **others: Never,
) -> ShardedAttention:
    """Compile a mask to an attention op on shards: each rank has its tokens of q, k and v, and gets those of out.

    Positions are those of the whole sequence, for masks, scores and dropout alike: each rank gets its shard of what one
    machine computes of everything. Only keys that a rank needs and doesn't hold travel.

    Args:
        mask: as in `maskflash.compile`; it needn't be what the plan was made for.
        plan: which tokens each rank holds.
        group: the ranks of the plan, in order: a process group, None for the default one, or a mesh of (ranks,) or of
            (ranks / head_ranks, head_ranks) where ranks share heads out. A plan of one rank needs none.
        score: as in `maskflash.compile`.
        scale: as in `maskflash.compile`.
        block_size: as in `maskflash.compile`.
        backend: "auto" takes the device's.
        stages: in how many parts the keys of others arrive, each computed with while the next one travels.
        **others: none.

    Returns:
        The op: `attn(q, k, v, **mask_args)`, to be called by all ranks of the group, each with its shard.

    Raises:
        MaskTraceError: the predicate does something that can't become an expression.
        ArgumentError: an argument is out of range.
        ArgumentTypeError: the plan is none, or the group.

    Source: Liu, Zaharia and Abbeel, Ring Attention, 2023, for parts of keys that travel while others are computed with;
    MagiAttention, 2025, for sending just what a mask needs; where ranks share heads out, DeepSpeed Ulysses, 2023.

    Example:
        >>> import torch
        >>> import maskflash as mf
        >>> plan = mf.parallel.plan(mf.causal(), 512, 1)  # of one rank, which needs nobody
        >>> attn = mf.parallel.compile(mf.causal(), plan)
        >>> q, k, v = torch.randn(3, 1, 4, 512, 64).unbind()
        >>> out = attn(*(plan.shard(x, 0) for x in (q, k, v)))
        >>> torch.equal(out, mf.attention(q, k, v, mf.causal()))
        True
    """
    operation = "parallel.compile"
    for name in others:
        raise unexpected(operation, name, None)
    arguments.instance(operation, "plan", plan, ShardPlan, "maskflash.parallel.plan makes one")
    if not (group is None or isinstance(group, dist.ProcessGroup | DeviceMesh)):
        raise ArgumentTypeError(
            f"{operation}: group is {arguments.by_type(group)}, expected a process group or a DeviceMesh; "
            "torch.distributed.new_group and init_device_mesh make them, in the processes that are its ranks"
        )
    arguments.choice(operation, "backend", backend, ("auto", "cpu", "triton"))
    count = _STAGES if stages is None else arguments.length(operation, "stages", stages, low=1)
    whole = api.compile(mask, score=score, scale=scale, block_size=block_size, backend=backend)
    return ShardedAttention(whole, plan, group, count)


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """What is kept of a kind of call.

    Attributes:
        work: what this rank computes.
        exchange: of heads for tokens; None where ranks have all heads.
        tables: a hash of what the mask's tables hold, and of what those of a score hold that learn nothing.
        watch: keeps ids in its key from being given away.
    """

    work: Assignment
    exchange: HeadExchange | None
    tables: tuple[str, str]
    watch: Watch


class ShardedAttention(Asking):
    """Attention under one mask on the shards of a plan: all ranks call it, each with its own tokens.

    What a mask needs of others is found once for each kind of call, and found again when a table has been written to.

    Attributes:
        plan: which tokens each rank holds.
        group: the ranks; None for the default group.
        stages: in how many parts the keys of others arrive.
    """

    def __init__(
        self, of: Attention, plan: ShardPlan, group: dist.ProcessGroup | DeviceMesh | None, stages: int
    ) -> None:
        super().__init__(of.given, of.scale, of.block_size, of.backend, of.deterministic, score=of.score)
        self.plan = plan
        self.group = group
        self.stages = stages
        self._ready: OrderedDict[Hashable, _Ready] = OrderedDict()
        self._lock = threading.Lock()

    def __dir__(self) -> list[str]:
        """What users may use."""
        return ["group", "plan", "stages"]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *more: Never,
        sinks: Tensor | None = None,
        dropout_p: float = 0,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        return_lse: bool = False,
        **mask_args: Any,
    ) -> Any:
        """Attend: this rank's queries to all keys that the mask shows them, whoever holds these.

        Every rank makes the same call. If one of them doesn't, or has an error, all raise the same error before any
        key has travelled. Backward is such a call too: every rank has to make it. torch.compile leaves calls as they
        are, between two graphs.

        Args:
            q: (B, Hq, Sr, D), the tokens of this rank in ascending order, as `plan.shard` gives them; Sr may be 0.
            k: (B, Hkv, Sr, D), of the same tokens.
            v: (B, Hkv, Sr, Dv).
            sinks: as in `maskflash.attention`; the same on every rank.
            dropout_p: as in `maskflash.attention`. Which pairs are dropped is what it is on one machine.
            generator: draws the seed; it has to draw the same on every rank.
            seed: the same on every rank.
            return_lse: also return the log-sum-exp.
            *more: none; what is passed there is answered by its name.
            **mask_args: the mask's own arguments, and the score function's: for all tokens, the same on every rank.

        Returns:
            out: (B, Hq, Sr, Dv) in q's dtype.
            lse: if asked for, (B, Hq, Sr). Both are differentiable in q, k, v, sinks and what floating tensors the
            score function looks up. Gradients of q, k and v are whole. Those of sinks and tables are of this rank's
            queries and heads: summed over all ranks they are those of one machine.

        Raises:
            ArgumentError: shapes, devices or ranges that don't fit the plan or each other; ranks make other calls.
            ArgumentTypeError: types or dtypes that don't fit.
            BackendError: the chosen backend can't run here.
            MaskIndexError: the mask reads a table out of range, or divides by zero, where no guard excludes it.
        """
        q, k, v = qkv.as_autocast(q, k, v)
        everyone = self._everyone()
        facts: dict[str, str] | Exception
        try:
            if more:
                raise surplus(_OPERATION, more, ("q", "k", "v"), (*self.mask.keywords, "sinks"))
            return_lse = arguments.flag(_OPERATION, "return_lse", return_lse)
            ranks = find_ranks(self.group, self.plan.world_size, self.plan.head_ranks)
            qkv.check(q, k, v, _OPERATION)
            if sinks is not None:
                qkv.check_sinks(sinks, q, _OPERATION)
            dropout = dropout_of(_OPERATION, dropout_p, generator, seed, q.device)
            sizes = self._whole(ranks.rank, q, k)
            spec = self._spec(sizes, q, sinks, mask_args, None, dropout, check=self.check)
            ready = self._find(spec, sizes, ranks, k, mask_args)
            facts = self._facts(spec, ready, q, k, v)
        except Exception as error:
            if everyone is None:
                raise
            facts = error
        if everyone is not None:
            agree(_OPERATION, everyone, facts, _FACTS)

        def run(spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return attend(ready.work, spec, q, k, v)

        if ready.exchange is not None:
            found = heads.attend(ready.exchange, spec, q, k, v, run, lse=return_lse)
            return found if return_lse else found[0]
        out, lse = run(spec, q, k, v)
        return (out, lse) if return_lse else out

    def _everyone(self) -> Ranks | None:
        """All ranks of the group, whatever the plan says of them; None for one process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        shape = self.group.shape if isinstance(self.group, DeviceMesh) else (dist.get_world_size(self.group),)
        found = find_ranks(self.group, prod(shape), shape[-1] if len(shape) > 1 else 1)
        return found if prod(shape) > 1 else None

    def _whole(self, rank: int, q: Tensor, k: Tensor) -> Sizes:
        """The sizes of the call that one machine would make."""
        for name, x in (("q", q), ("k", k)):
            if x.shape[2] != self.plan.tokens(rank):
                raise ArgumentError(
                    f"{_OPERATION}: {name} has {x.shape[2]} tokens, expected the {self.plan.tokens(rank)} that rank "
                    f"{rank} of the plan holds; plan.shard({name}, {rank}) takes them out of all tokens"
                )
        tokens = self.plan.seq_len
        return Sizes(tokens, tokens, q.shape[0], q.shape[1], q.device, operation=_OPERATION)

    def _find(self, spec: Spec, sizes: Sizes, ranks: Ranks, k: Tensor, mask_args: dict[str, Any]) -> _Ready:
        """What is to be done in calls like this one, made now or found."""
        fixed = [table for table in spec.score_tables if not table.is_floating_point()]
        states = [cache.identity(table) for table in fixed]
        key = cache.key_of(spec, sizes), sizes.batch, sizes.heads, *states, ranks, cache.epoch()
        with self._lock:
            ready = self._ready.get(key)
            if ready is not None:
                self._ready.move_to_end(key)
                return ready
        of_heads = heads.share(_OPERATION, sizes.heads, k.shape[1], self.plan.head_ranks, ranks.heads.place)
        try:
            work = self._assignment(spec, sizes, ranks, of_heads)
            cache.check_reads(spec, sizes)
        except MaskIndexError:  # the same again, from the user's own lines
            from maskflash.analysis.classify import classify

            classify(self._problem(sizes, mask_args))
            raise
        exchange = None
        if self.plan.head_ranks > 1:
            first = ranks.rank - ranks.heads.place
            row = self.plan.shards[first : first + self.plan.head_ranks]
            exchange = HeadExchange.of(row, ranks.heads, sizes.device)
        watch = Watch(owner(table) for table in (*spec.tables, *fixed) if not table.is_inference())
        ready = _Ready(work, exchange, (_hash(spec.tables), _hash(fixed)), watch)
        with self._lock:
            for gone in [old for old, kept in self._ready.items() if kept.watch.expired()]:
                del self._ready[gone]
            self._ready[key] = ready
            while len(self._ready) > _MOST:
                self._ready.popitem(last=False)
        return ready

    def _assignment(self, spec: Spec, sizes: Sizes, ranks: Ranks, of_heads: range) -> Assignment:
        """What this rank computes: which keys arrive when, and the analyses of all portions."""
        shards, place = heads.joined(self.plan.shards, self.plan.head_ranks), ranks.tokens.place
        rows = Tokens.of(shards[place], sizes.device)
        portions: list[Portion] = [Portion(rows, None)]
        if len(shards) > 1:
            routes = find_routes(find_needs(spec.problem(sizes).on_host(), self.plan.tile), shards)
            stages = find_stages(routes, shards, place, self.stages, sizes.device)
            portions += [Portion(stage.keys, None, stage) for stage in stages]
        if self.plan.head_ranks > 1:
            spec = part(spec, range(sizes.batch), of_heads)
        found = []
        for portion in portions:
            own = sizes._replace(q_len=len(rows.at), kv_len=len(portion.keys.at), heads=len(of_heads))
            needed = portion.stage is None or own.kv_len > 0
            analysis = cache.find(of_tokens(spec, rows, portion.keys), own) if needed else None
            found.append(Portion(portion.keys, analysis, portion.stage))
        return Assignment(rows, tuple(found), ranks.tokens)

    def _facts(self, spec: Spec, ready: _Ready, q: Tensor, k: Tensor, v: Tensor) -> dict[str, str]:
        """What has to be the same on every rank, as errors show it."""
        plan = self.plan
        named = {"q": q, "k": k, "v": v, "sinks": spec.sinks}
        learning = [name for name, x in named.items() if x is not None and x.requires_grad and torch.is_grad_enabled()]
        learning += ["the score's tables"] * any(spec.learned)
        forms = [(table.dtype, tuple(table.shape)) for table in spec.score_tables]
        score = "none" if self.score is None else self.score.name
        placed = plan.tile, plan.shards, plan.head_ranks
        said = (
            f"{plan.seq_len} tokens on {plan.world_size} ranks ({_short(*placed)})",
            f"{self.name} ({_short(spec.expr, *spec.params, self.block_size)})",
            ready.tables[0],
            f"{score} ({_short(spec.score, *spec.score_params, *forms)})",
            ready.tables[1],
            f"(batch, heads, kv_heads, head_dim, v_head_dim) = {(*q.shape[:2], k.shape[1], q.shape[3], v.shape[3])}",
            "none" if spec.sinks is None else f"{spec.sinks.dtype}",
            f"{q.dtype}",
            f"{spec.scale}",
            "none" if spec.seed is None else f"{spec.dropout_p} with seed {int(spec.seed)}",
            ", ".join(learning) or "nothing",
            f"{self.stages}",
        )
        return dict(zip(_FACTS, said, strict=True))

    def __repr__(self) -> str:
        return f"ShardedAttention({self.name}, {self.plan.world_size} ranks of {self.plan.seq_len} tokens)"


def _short(*values: Any) -> str:
    """A hash of values that have a text."""
    return hashlib.blake2b(repr(values).encode(), digest_size=4).hexdigest()


def _hash(tables: Sequence[Tensor]) -> str:
    """A hash of what tables hold."""
    digest = hashlib.blake2b(digest_size=8)
    for table in tables:
        digest.update(f"{table.dtype} {tuple(table.shape)}\n".encode())
        digest.update(contents(table))
    return digest.hexdigest()


later.follow("torch._dynamo", "maskflash.parallel.eager")
