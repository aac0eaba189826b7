"""A mask and a plan of shards -> the attention op that each rank calls with its own tokens."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final, Literal, Never

import torch
import torch.distributed as dist
from torch import Tensor

from maskflash import api
from maskflash.errors import ArgumentError, MaskIndexError
from maskflash.functions.fingerprint import contents
from maskflash.functions.sizes import Sizes
from maskflash.ground import arguments, qkv
from maskflash.ground.arguments import BlockSize
from maskflash.ground.identity import Watch, owner
from maskflash.ground.names import unexpected
from maskflash.masks.predicate import MaskLike
from maskflash.op import cache
from maskflash.op.asking import Asking, dropout_of
from maskflash.op.attention import Attention
from maskflash.op.parts import Tokens, of_tokens
from maskflash.op.spec import Spec
from maskflash.parallel.agree import agree
from maskflash.parallel.attention import Share, Work, attend
from maskflash.parallel.exchange import find_stages
from maskflash.parallel.needs import find_needs
from maskflash.parallel.plan import ShardPlan
from maskflash.parallel.routes import find_routes
from maskflash.scores.score import ScoreLike

_OPERATION: Final = "parallel attention"
_FACTS: Final = (
    *("the plan", "the mask", "what its tables hold", "the score", "what tables of the score hold", "the shape"),
    *("the dtype", "the scale", "whether there are sinks", "dropout", "whether gradients are asked for", "stages"),
)
_STAGES: Final = 1  # of keys that travel, where nobody asks for another number
_MOST: Final = 16  # works that are kept; the least recently used goes first


def compile(
    mask: MaskLike | Tensor,
    plan: ShardPlan,
    *,
    group: dist.ProcessGroup | None = None,
    score: ScoreLike | None = None,
    scale: float | None = None,
    block_size: BlockSize = 128,
    backend: Literal["auto", "cpu", "triton"] = "auto",
    stages: int | None = None,
    **others: Never,
) -> ShardedAttention:
    """Compile a mask to an attention op on shards: each rank has its tokens of q, k and v, and gets those of out.

    Positions are those of the whole sequence, for masks, scores and dropout alike: each rank gets its shard of what one
    machine computes of everything. Only keys that a rank needs and doesn't hold travel, point to point.

    Args:
        mask: as in `maskflash.compile`; it needn't be what the plan was made for.
        plan: which tokens each rank holds.
        group: the ranks of the plan, in order; None for all. A plan of one rank needs no process group.
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

    Source: what travels is what MagiAttention's group cast moves (Zewei and Yunpeng, 2025); parts of the keys are merged
    as in Liu, Zaharia and Abbeel, Ring Attention, 2023.

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
    if group is not None:
        arguments.instance(operation, "group", group, dist.ProcessGroup, "torch.distributed.new_group makes one")
    arguments.choice(operation, "backend", backend, ("auto", "cpu", "triton"))
    count = _STAGES if stages is None else arguments.length(operation, "stages", stages, low=1)
    whole = api.compile(mask, score=score, scale=scale, block_size=block_size, backend=backend)
    return ShardedAttention(whole, plan, group, count)


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """What is kept of a kind of call.

    Attributes:
        work: what this rank computes.
        tables: a hash of what the mask's tables hold, and of what those of a score hold that learn nothing.
        watch: keeps ids in its key from being given away.
    """

    work: Work
    tables: tuple[str, str]
    watch: Watch


class ShardedAttention(Asking):
    """Attention under one mask on the shards of a plan: all ranks call it, each with its own tokens.

    What a mask needs of others is found once for each kind of call, and found again when a table has been written to.

    Attributes:
        plan: which tokens each rank holds.
        group: the ranks; None for all.
        stages: in how many parts the keys of others arrive.
    """

    def __init__(self, of: Attention, plan: ShardPlan, group: dist.ProcessGroup | None, stages: int) -> None:
        super().__init__(of.given, of.scale, of.block_size, of.backend, of.deterministic, score=of.score)
        self.plan = plan
        self.group = group
        self.stages = stages
        self._ready: OrderedDict[Hashable, _Ready] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        sinks: Tensor | None = None,
        dropout_p: float = 0,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        return_lse: bool = False,
        **mask_args: Any,
    ) -> Any:
        """Attend: this rank's queries to all keys that the mask shows them, whoever holds these.

        Every rank of the group makes the same call. If one of them doesn't, or has an error, all raise the same error,
        before any key has travelled. Backward is such a call too: every rank has to make it.

        Args:
            q: (B, Hq, Sr, D), the tokens of this rank, as `plan.shard` gives them: in ascending order. Sr may be 0.
            k: (B, Hkv, Sr, D), of the same tokens.
            v: (B, Hkv, Sr, Dv).
            sinks: as in `maskflash.attention`; the same on every rank.
            dropout_p: as in `maskflash.attention`. Which pairs are dropped is what it is on one machine.
            generator: draws the seed; it has to draw the same on every rank.
            seed: the same on every rank.
            return_lse: also return the log-sum-exp.
            **mask_args: the mask's own arguments, and the score function's: for all tokens, the same on every rank.

        Returns:
            out: (B, Hq, Sr, Dv) in q's dtype.
            lse: if asked for, (B, Hq, Sr). Both are differentiable in q, k, v, sinks and what floating tensors the score
            function looks up. Gradients of q, k and v are whole. Those of sinks and tables are of this rank's queries:
            summed over the ranks, as data parallel sums those of all weights, they are those of one machine.

        Raises:
            ArgumentError: shapes, devices or ranges that don't fit the plan or each other; ranks that make other calls.
            ArgumentTypeError: types or dtypes that don't fit.
            BackendError: the chosen backend can't run here.
            MaskIndexError: the mask reads a table out of range, or divides by zero, where no guard excludes it.
        """
        q, k, v = qkv.as_autocast(q, k, v)
        facts: dict[str, str] | Exception
        try:
            return_lse = arguments.flag(_OPERATION, "return_lse", return_lse)
            rank = self._rank()
            qkv.check(q, k, v, _OPERATION)
            dropout = dropout_of(_OPERATION, dropout_p, generator, seed, q.device)
            sizes = self._whole(rank, q, k)
            if sinks is not None:
                qkv.check_sinks(sinks, q, _OPERATION)
            spec = self._spec(sizes, q, sinks, mask_args, None, dropout)
            ready = self._find(spec, sizes, rank, k, mask_args)
            facts = self._facts(spec, ready, q, k, v)
        except Exception as error:
            if not self._meets():
                raise
            facts = error
        if self._meets():
            agree(self.group, facts, _FACTS)
        out, lse = attend(ready.work, spec, q, k, v)
        return (out, lse) if return_lse else out

    def _meets(self) -> bool:
        """Whether there are others to agree with."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def _rank(self) -> int:
        """This rank, where there are as many as the plan has."""
        ranks = self.plan.world_size
        if not (dist.is_available() and dist.is_initialized()):
            if ranks == 1:
                return 0
            raise ArgumentError(
                f"{_OPERATION}: the plan has {ranks} ranks and there is no process group, expected one; call "
                "torch.distributed.init_process_group in every process first"
            )
        found = dist.get_world_size(self.group)
        if found != ranks:
            raise ArgumentError(
                f"{_OPERATION}: the plan has {ranks} ranks and the group {found}, expected as many; make the plan for "
                f"world_size={found}, or pass the group of its ranks"
            )
        return dist.get_rank(self.group)

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

    def _find(self, spec: Spec, sizes: Sizes, rank: int, k: Tensor, mask_args: dict[str, Any]) -> _Ready:
        """What is to be done in calls like this one, made now or found."""
        fixed = [table for table in spec.score_tables if not table.is_floating_point()]
        key = cache.key_of(spec, sizes), *[cache.identity(table) for table in fixed]
        with self._lock:
            ready = self._ready.get(key)
            if ready is not None and not ready.watch.expired():
                self._ready.move_to_end(key)
                return ready
        try:
            work = self._work(spec, sizes, rank, k)
            cache.check_reads(spec, sizes)
        except MaskIndexError:  # the same again, from the user's own lines
            from maskflash.analysis.classify import classify

            classify(self._problem(sizes, mask_args))
            raise
        tables = [*spec.tables, *fixed]
        watch = Watch(owner(table) for table in tables if not table.is_inference())
        ready = _Ready(work, (_hash(spec.tables), _hash(fixed)), watch)
        with self._lock:
            self._ready[key] = ready
            while len(self._ready) > _MOST:
                self._ready.popitem(last=False)
        return ready

    def _work(self, spec: Spec, sizes: Sizes, rank: int, k: Tensor) -> Work:
        """What this rank computes: which keys arrive when, and the analyses of all parts."""
        shards = self.plan.shards
        rows = Tokens.of(shards[rank], sizes.device)
        shares = [Share(rows, None)]
        if len(shards) > 1:
            routes = find_routes(find_needs(spec.problem(sizes).on_host(), self.plan.tile), shards)
            stages = find_stages(routes, shards, rank, self.stages, sizes.device)
            shares += [Share(stage.keys, None, stage) for stage in stages]
        found = []
        for share in shares:
            part = sizes._replace(q_len=len(rows.at), kv_len=len(share.keys.at))
            is_some = share.stage is None or part.kv_len > 0
            analysis = cache.find(of_tokens(spec, rows, share.keys), part) if is_some else None
            found.append(Share(share.keys, analysis, share.stage))
        return Work(rows, tuple(found), self.group)

    def _facts(self, spec: Spec, ready: _Ready, q: Tensor, k: Tensor, v: Tensor) -> dict[str, str]:
        """What has to be the same on every rank, as errors show it."""
        plan = self.plan
        learning = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, spec.sinks, *spec.score_tables)
        )
        forms = [(table.dtype, tuple(table.shape)) for table in spec.score_tables]
        score = "None" if self.score is None else self.score.name
        said = (
            f"{plan.seq_len} tokens on {plan.world_size} ranks ({_short(plan.tile, plan.shards)})",
            f"{self.name} ({_short(spec.expr, *spec.params)})",
            ready.tables[0],
            f"{score} ({_short(spec.score, *spec.score_params, *forms)})",
            ready.tables[1],
            f"(batch, heads, kv_heads, head_dim, v_head_dim) = {(*q.shape[:2], k.shape[1], q.shape[3], v.shape[3])}",
            str(q.dtype),
            str(spec.scale),
            str(spec.sinks is not None),
            "0" if spec.seed is None else f"{spec.dropout_p} with seed {int(spec.seed)}",
            str(learning),
            str(self.stages),
        )
        return dict(zip(_FACTS, said, strict=True))

    def __repr__(self) -> str:
        return f"ShardedAttention({self.name}, {self.plan.world_size} ranks of {self.plan.seq_len} tokens)"


def _short(*values: Any) -> str:
    """A hash of values that have a text."""
    return hashlib.blake2b(repr(values).encode(), digest_size=4).hexdigest()


def _hash(tables: list[Tensor] | Any) -> str:
    """A hash of what tables hold."""
    digest = hashlib.blake2b(digest_size=8)
    for table in tables:
        digest.update(f"{table.dtype} {tuple(table.shape)}\n".encode())
        digest.update(contents(table))
    return digest.hexdigest()
