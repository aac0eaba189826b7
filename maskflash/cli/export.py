"""`maskflash export`: a mask -> another engine's own form of it, printed or as JSON."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Final

from torch import Tensor

from maskflash.cli import terminal
from maskflash.cli.masks import Subject, subject
from maskflash.cli.parser import FORMS
from maskflash.forms.arguments import LIBRARIES
from maskflash.masks.sight import Sight

Form = dict[str, Any]
"""A form's parts by name: tensors, numbers, texts."""

_SHOWN: Final = 8  # numbers of a tensor
_BLOCK: Final = 128


def run(args: Namespace) -> int:
    """Print the form."""
    seen = subject(args)
    size = args.block_size or (_BLOCK, _BLOCK)
    with terminal.working(f"exporting {seen.mask}"):
        sight = seen.mask.at(seen.q_len, seen.kv_len, batch=seen.batch, heads=seen.heads)
        form = dict(_parts("", _MADE[args.to](sight, size)))
    if args.json:
        plain = {name: _plain(value) for name, value in form.items()}
        terminal.print_json({**seen.to_dict(), "to": args.to, "form": plain})
        return 0
    console = terminal.console()
    console.print(f"{_title(seen)} for {FORMS[args.to]}\n")
    width = max(map(len, form), default=0)
    for name, value in form.items():
        console.print(f"  {name:<{width}}  {_told(value)}".replace("\n", "\n" + " " * (width + 4)).rstrip())
    return 0


def _title(seen: Subject) -> str:
    rows = f" x {seen.batch} batch rows" if seen.batch > 1 else ""
    return f"{seen.mask}: {seen.q_len:,} queries x {seen.kv_len:,} keys{rows},"


def _cudnn(sight: Sight, _: tuple[int, int]) -> Form:
    return {"mask_func": sight.to_row_intervals().to_cudnn()}


def _magi(sight: Sight, _: tuple[int, int]) -> Form:
    slices = sight.to_slices()
    return {"q_ranges": slices.q_ranges, "k_ranges": slices.k_ranges, "attn_type_map": slices.types}


def _fa4(sight: Sight, size: tuple[int, int]) -> Form:
    function = sight.to_cute()
    reads = {"aux_tensors": list(function.aux_tensors), "aux_scalars": list(function.scalars)}
    return {"blocks": sight.to_block_sparse(size), "mask_mod": function.text, **reads}


def _flex(sight: Sight, size: tuple[int, int]) -> Form:
    found = sight.to_block_mask(size)
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "BLOCK_SIZE")
    return {name: getattr(found, name) for name in names}


def _flashmask(sight: Sight, _: tuple[int, int]) -> Form:
    found = sight.to_flashmask()
    return {"startend_row_indices": found.startend_row_indices, "causal": found.causal}


def _arguments(library: str) -> Callable[[Sight, tuple[int, int]], Form]:
    return lambda sight, _: sight.as_arguments(library)


_MADE: Final[dict[str, Callable[[Sight, tuple[int, int]], Any]]] = {
    "intervals": lambda sight, _: sight.to_row_intervals(),
    "cudnn": _cudnn,
    "magi": _magi,
    "fa4": _fa4,
    "flashinfer": lambda sight, size: sight.to_block_rows(size),
    "flashinfer_packed": lambda sight, _: sight.to_packed_mask(),
    "vllm": lambda sight, _: sight.to_prefix_ranges(),
    "flex": _flex,
    "flashmask": _flashmask,
    **{name: _arguments(name) for name in LIBRARIES if name != "vllm"},  # whose ranges hold more
}


def _parts(prefix: str, form: Any) -> Iterator[tuple[str, Any]]:
    """The named parts of a form, those of its parts with their names before them."""
    if isinstance(form, dict):
        named: Form = form
    elif hasattr(form, "_asdict"):
        named = form._asdict()
    else:
        named = {field.name: getattr(form, field.name) for field in fields(form)}
    for name, value in named.items():
        if isinstance(value, dict) or is_dataclass(value) or hasattr(value, "_asdict"):
            yield from _parts(f"{prefix}{name}.", value)
        elif not callable(value):
            yield f"{prefix}{name}", value


def _plain(value: Any) -> Any:
    """A part as plain data."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.tolist() if isinstance(value, Tensor) else value


def _told(value: Any) -> str:
    """A part as a line."""
    if isinstance(value, list):
        return ", ".join(map(_told, value)) or "none"
    if not isinstance(value, Tensor):
        return "none" if value is None else str(value)
    shape = " x ".join(f"{size:,}" for size in value.shape)
    first = ", ".join(f"{x:,}" for x in value.flatten()[:_SHOWN].tolist())
    more = ", ..." if value.numel() > _SHOWN else ""
    return f"{str(value.dtype).removeprefix('torch.')} ({shape}): {first}{more}"
