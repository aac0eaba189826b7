"""The text of a mask, such as "causal & document(300, 500, 224)" -> a mask, and the tokens it speaks of; of scores too.

    mask    =  preset | preset(argument, ...) | mask & mask | mask | mask | mask ^ mask | ~mask | (mask)
    preset   = one of maskflash's, or a library's name with its own arguments: transformers(sliding_window=128)
    argument = value | name=value
    score   =  preset | preset(argument, ...) | score, score          applied in turn
    value   =  integer | True | False | None | "text" | [value, ...] | (value, ...) | [value, ...] * integer

Python's parser reads the text and its tree is walked: nothing is evaluated, and what isn't listed here is an error that
points at its place.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

from maskflash import presets, scores
from maskflash.errors import ArgumentError, MaskflashError
from maskflash.forms.arguments import LIBRARIES, from_arguments
from maskflash.masks.mask import Mask
from maskflash.scores.score import Score, as_score

_JOINS: Final[dict[type[ast.operator], Callable[[Mask, Mask], Mask]]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_ITEMS: Final = 1 << 22  # of a repeated list: as many documents as anybody packs
_TOKENS: Final = 1 << 24  # and as many tokens; a mask holds a table with an entry for each
_VARIADIC: Final = ("document", "causal_document", "causal_blockwise", "padding")  # several integers are one list
_LENGTHS: Final = ("lengths", "kv_lengths", "prefixes", "documents")  # arguments whose numbers add up to tokens


def _paper(name: str, seq_len: int, seed: int = 0) -> Mask:
    return presets.paper(name, seq_len, seed).predicate


PRESETS: Final[dict[str, Callable[..., Mask]]] = {
    **{name: getattr(presets, name) for name in presets.__all__ if name not in ("PAPER", "PaperMask", "paper")},
    "paper": _paper,
    **{library: partial(from_arguments, library) for library in LIBRARIES},
}


SCORES: Final = ("softcap", "alibi", "temperature")
"""Score functions of numbers alone; the others look tensors up, which a text has none of."""


class MaskSyntaxError(ArgumentError):
    """A mask's, or a score's, text says nothing; the text has the column, and a line that points at it."""


@dataclass(frozen=True, slots=True)
class Written:
    """A mask, and the tokens that its presets speak of; None where they speak of none."""

    mask: Mask
    tokens: int | None


def parse(text: str) -> Written:
    """Read a mask's text.

    Args:
        text: a mask as above; `causal` is `causal()`, and `document(300, 500)` is `document(lengths=[300, 500])`.

    Raises:
        MaskSyntaxError: what is wrong, and where.

    Example:
        >>> parse("causal & document(300, 500, 224)")
        Written(mask=causal() & document(3 documents), tokens=1024)
        >>> parse("causal & documents(300)")
        Traceback (most recent call last):
        ...
        maskflash.cli.expression.MaskSyntaxError: column 10: there is no preset 'documents'; did you mean document?
          causal & documents(300)
                   ^^^^^^^^^
    """
    line = " ".join(text.split())
    try:
        return _Reader(line).mask(_tree(line))
    except RecursionError:
        _refuse(line, 0, 1, "this is nested too deeply")


def parse_score(text: str) -> Score:
    """Read a score function's text, of one preset or of several that are applied in turn.

    Raises:
        MaskSyntaxError: what is wrong, and where.

    Example:
        >>> parse_score("softcap(20), alibi")
        softcap(20), alibi()
    """
    line = " ".join(text.split())
    reader, tree = _Reader(line), _tree(line)
    parts = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    return as_score("--score", [reader.score(part) for part in parts])


def _tree(line: str) -> ast.expr:
    try:
        return ast.parse(line, mode="eval").body
    except SyntaxError as error:
        if not error.offset:
            _refuse(line, len(line), 1, "this can't be read: it ends too soon")
        _refuse(line, error.offset - 1, 1, f"this can't be read: {error.msg}")
    except (ValueError, MemoryError):  # a null byte; parentheses beyond what the parser holds
        _refuse(line, 0, 1, "this can't be read")


class _Reader:
    """Walks the tree of one text."""

    def __init__(self, line: str) -> None:
        self.line = line

    def mask(self, node: ast.expr) -> Written:
        match node:
            case ast.Name(id=name):
                return self._preset(node, name, [], [])
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return self._preset(node, name, args, keywords)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _JOINS:
                a, b = self.mask(left), self.mask(right)
                return Written(_JOINS[type(op)](a.mask, b.mask), _larger(a.tokens, b.tokens))
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                inner = self.mask(operand)
                return Written(~inner.mask, inner.tokens)
            case ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
                self._refuse(node, "masks are joined by & | ^ ~, not by and, or, not")
        self._refuse(node, f"expected a mask, such as causal or document(300, 500), got {self._source(node)}")

    def score(self, node: ast.expr) -> Score:
        """A score function's preset."""
        match node:
            case ast.Name(id=name):
                args: list[Any] = []
                named: dict[str, Any] = {}
            case ast.Call(func=ast.Name(id=name), args=given, keywords=keywords):
                args = [self._value(arg) for arg in given]
                named = {keyword.arg or "**": self._value(keyword.value) for keyword in keywords}
            case _:
                self._refuse(node, f"expected a score, such as softcap(20), got {self._source(node)}")
        if name not in SCORES:
            why = "looks a tensor up: write file.py:function" if name in scores.__all__ else "is no preset of scores"
            self._refuse(node, f"{name!r} {why}; there are {', '.join(SCORES)}")
        try:
            found: Score = getattr(scores, name)(*args, **named)
        except (MaskflashError, TypeError, ValueError) as error:
            self._refuse(node, str(error))
        return found

    def _preset(self, node: ast.expr, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Written:
        called = node.func if isinstance(node, ast.Call) else node
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
            self._refuse(called, f"there is no preset {name!r}; {hint}")
        if name in LIBRARIES and args:
            self._refuse(args[0], f"{name} takes {', '.join(LIBRARIES[name].takes)}, each by name")
        values = [self._value(arg) for arg in args]
        if name in _VARIADIC and values and all(isinstance(value, int) for value in values):
            values = values if name == "padding" and len(values) == 1 else [values]
        named: dict[str, Any] = {}
        for keyword in keywords:
            if keyword.arg is None:
                self._refuse(keyword.value, "** is not understood here; write name=value")
            named[keyword.arg] = self._value(keyword.value)
        given = dict(zip(_LEADING.get(name, ()), values, strict=False)) | named
        self._limit(node, max((_sum(given[key]) for key in _LENGTHS if key in given), default=0))
        try:
            mask = PRESETS[name](*values, **named)
        except (MaskflashError, TypeError, ValueError) as error:
            self._refuse(node, str(error).replace("_paper()", "paper()"))
        tokens = _tokens(name, given)
        self._limit(node, tokens or 0)
        return Written(mask, tokens)

    def _limit(self, node: ast.expr, tokens: int) -> None:
        if tokens > _TOKENS:
            self._refuse(node, f"this speaks of {tokens:,} tokens, expected at most {_TOKENS:,}")

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                if isinstance(value, int) and value > _TOKENS:
                    self._refuse(node, f"this number is too large, expected at most {_TOKENS:,}")
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float()) as operand):
                return -self._value(operand)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._value(item) for item in items]
            case ast.BinOp(left=ast.List() as items, op=ast.Mult(), right=ast.Constant(value=int(times))):
                held = self._value(items)
                if len(held) * times > _ITEMS:
                    self._refuse(node, f"this list has {len(held) * times:,} items, expected at most {_ITEMS:,}")
                return held * times
        self._refuse(node, f"expected a number, a list or text, got {self._source(node)}")

    def _source(self, node: ast.expr) -> str:
        found = ast.unparse(node)
        return found if len(found) <= 40 else f"{found[:37]}..."

    def _refuse(self, node: ast.expr, message: str) -> NoReturn:
        encoded = self.line.encode()  # the tree counts bytes of UTF-8
        start, stop = (len(encoded[:place].decode()) for place in (node.col_offset, node.end_col_offset))
        _refuse(self.line, start, stop - start, message)


def _refuse(line: str, start: int, width: int, message: str) -> NoReturn:
    start = min(max(start, 0), len(line))
    pointer = " " * start + "^" * max(1, min(width, len(line) - start))
    raise MaskSyntaxError(f"column {start + 1}: {message}\n  {line}\n  {pointer}")


def _sum(value: Any) -> int:
    """What the integers in nested lists add up to."""
    if isinstance(value, list):
        return sum(map(_sum, value))
    return value if isinstance(value, int) else 0


def _tokens(name: str, given: dict[str, Any]) -> int | None:
    """How many tokens a preset's arguments add up to."""
    match name:
        case "document" | "causal_document" | "causal_blockwise" | "prefix_lm_document":
            lengths = given.get("lengths")
            if lengths is None:
                starts, ids = given.get("cu_seqlens"), given.get("ids")
                return int(starts[-1]) if starts else _innermost(ids)
            rows = lengths if lengths and isinstance(lengths[0], list) else [lengths]
            return max(int(sum(row)) for row in rows)
        case "flash_attn_varlen" | "torch_varlen":
            return int(given["cu_seqlens_q" if name == "flash_attn_varlen" else "cu_seq_q"][-1])
        case "xformers":
            return _sum(given["q_seqlen"]) if "q_seqlen" in given else None
        case "natten":
            return int(given["height"] * given["width"])
        case "neighborhood" | "sliding_tiles":
            shape = given["shape"]
            return math.prod(shape) if isinstance(shape, list) else int(shape)
        case "block_diffusion":
            return int(2 * given["n"])
        case "share_question":
            return sum(int(question + sum(answers)) for question, answers in given["documents"])
        case "paper":
            return int(given["seq_len"])
        case "random_eviction":
            return _innermost(given["evicted_at"])
        case "tree":
            return _innermost(given["parents"])
    return None


def _innermost(table: Any) -> int:
    return _innermost(table[0]) if table and isinstance(table[0], list) else len(table)


_LEADING: Final[dict[str, tuple[str, ...]]] = {
    "document": ("lengths",),
    "causal_document": ("lengths",),
    "causal_blockwise": ("lengths",),
    "prefix_lm_document": ("lengths",),
    "natten": ("height", "width"),
    "neighborhood": ("shape",),
    "sliding_tiles": ("shape",),
    "block_diffusion": ("n",),
    "share_question": ("documents",),
    "paper": ("name", "seq_len"),
    "random_eviction": ("evicted_at",),
    "tree": ("parents",),
}


def _larger(a: int | None, b: int | None) -> int | None:
    known = [tokens for tokens in (a, b) if tokens is not None]
    return max(known, default=None)
