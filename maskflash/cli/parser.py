"""The command line's grammar: subcommands, their options, and the help with examples."""

from __future__ import annotations

import argparse
import math
import textwrap
from pathlib import Path
from typing import Final

import maskflash
from maskflash.errors import MaskflashError
from maskflash.parallel.links import KNOWN, Links

DTYPES: Final = ("float32", "bfloat16", "float16")
ARCHS: Final = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
USUAL: Final = ("full", "causal", "sliding_window(256)", "document(300, 724)", "causal & document(300, 724)")
FORMS: Final = {
    "intervals": "what each query sees",
    "cudnn": "cuDNN's flexible attention (create_mask_plan)",
    "magi": "MagiAttention (flex_flash_attn_func)",
    "fa4": "FlashAttention 4 (block_sparse_tensors)",
    "flashinfer": "FlashInfer's block-sparse attention (plan)",
    "flashinfer_packed": "FlashInfer's custom mask (packed_custom_mask)",
    "vllm": "vLLM's windows and image ranges",
    "flex": "FlexAttention (BlockMask)",
    "flashmask": "FlashMask (startend_row_indices)",
    "flash_attn": "flash_attn_func",
    "flash_attn_varlen": "flash_attn_varlen_func",
    "torch_varlen": "torch.nn.attention.varlen.varlen_attn",
    "sdpa": "scaled_dot_product_attention",
    "xformers": "xFormers' memory_efficient_attention",
    "flash_attn_3": "FlashAttention 3's flash_attn_func",
    "flash_attn_4": "FlashAttention 4's flash_attn_func",
    "flashinfer_prefill": "FlashInfer's prefill kernels",
    "transformers": "a layer of a Transformers model",
    "paddle": "Paddle's flashmask_attention",
    "jax": "jax.nn.dot_product_attention",
}
"""What `export --to` knows, and whose form each is."""

_MOST: Final = 1 << 27  # tokens, and whatever else is counted; more than the largest mask of an expression has
_WIDTH: Final = 78  # of descriptions; argparse leaves them alone where examples are laid out by hand

_MASK: Final = """\
MASK is an expression of presets, quoted for the shell, or what a file defines:

  causal                                  as causal()
  "causal & document(300, 500, 224)"      as lengths=[300, 500, 224]
  "global_tokens(16) | sliding_window(256, right=256)"
  "causal & document([4096] * 256)"       a million tokens
  "paper('share_question', 8192)"         the FlashMask paper's masks
  "transformers(sliding_window=128)"      what a library means by its arguments
  masks.py:packed                         a mask, or f(b, h, q, kv) -> bool

Masks join by & | ^ ~ and parentheses. Lengths that aren't given are what the
documents add up to, else 4,096 tokens.
"""
_STATUS: Final = "Exit status: 0 all well, 1 a result is wrong or masks differ, 2 wrong usage.\n"


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    made = argparse.ArgumentParser(
        prog="maskflash",
        description="Flexible-mask attention, compiled: look at a mask, ask what would run, measure it here.",
        epilog=f"{_MASK}\n{_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"maskflash {maskflash.__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="command")
    _show(commands)
    _compare(commands)
    _explain(commands)
    _export(commands)
    _shard(commands)
    _bench(commands)
    _warm(commands)
    _demo(commands)
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine can run, and why not the rest",
        description="Look at versions, backends, devices and the kernel cache, and run a small attention on each "
        "device. Exits with 1 if something is broken; a machine without a GPU is not.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return made


Commands = argparse._SubParsersAction


def _show(commands: Commands[argparse.ArgumentParser]) -> None:
    show = _of_mask(
        commands,
        "show",
        "draw a mask in the terminal, and count its tiles",
        "Draw a mask: dark where all pairs of a cell are visible, light where some are, a dot where none is. Without "
        "--block-size cells are as small as fit the terminal; with it they are the tiles, or groups of them.",
        'maskflash show "causal & document(300, 500, 224)"',
        'maskflash show "sliding_window(4096)" --q-len 1048576 --png window.png',
        'maskflash show "causal & document([4096] * 256)" --html packed.html',
        "maskflash show causal --score alibi --heads 8 --head 2 --png alibi.png",
        "maskflash show masks.py:packed --block-size 64 --json",
    )
    _with_score(show)
    show.add_argument(
        "--at",
        type=_number,
        metavar="X",
        help="with --score: which score it changes, the same for all pairs (default: 0)",
    )
    show.add_argument("--batch-row", type=_index, default=0, metavar="N", help="to draw (default: %(default)s)")
    show.add_argument("--head", type=_index, default=0, metavar="N", help="to draw (default: %(default)s)")
    show.add_argument(
        "--png", metavar="FILE", help="also draw the mask, its tiles and what the score function adds, by matplotlib"
    )
    show.add_argument(
        "--html", metavar="FILE", help="also write the explorer, a page to zoom and ask: it needs nothing but a browser"
    )


def _compare(commands: Commands[argparse.ArgumentParser]) -> None:
    _of_mask(
        commands,
        "compare",
        "say whether two masks show the same pairs, and draw where they don't",
        "Compare two masks: what each shows that the other hides, how many pairs, and a picture of the first ones. "
        "Exits with 1 if they differ. Names of libraries stand for what they mean by their own arguments. Without "
        "--q-len the lengths are at least twice the largest number in the masks.",
        'maskflash compare "flash_attn(causal=True, window_size=(128, 0))" "transformers(sliding_window=128)"',
        'maskflash compare "sdpa(is_causal=True)" "flash_attn(causal=True)" --q-len 4 --kv-len 8',
        'maskflash compare masks.py:ours "causal & document(300, 500, 224)" --json',
        nargs=2,
        tiles=False,
    )


def _with_score(command: argparse.ArgumentParser) -> None:
    """The option of a score function."""
    command.add_argument(
        "--score",
        metavar="SCORE",
        help='a score function: softcap(20), alibi, temperature(0.5), several as "softcap(20), alibi", or '
        "file.py:function; what it hides counts as hidden",
    )


def _explain(commands: Commands[argparse.ArgumentParser]) -> None:
    explain = _of_mask(
        commands,
        "explain",
        "say what was traced, how tiles were decided, and what would run",
        "Say what a mask became: its expression, its tiles and how they were decided, the backend and what each pass "
        "of it runs, and a prediction of the memory traffic beside dense attention's.",
        'maskflash explain "causal & document(300, 500, 224)"',
        'maskflash explain "sliding_window(512)" --head-dim 128 --fast-memory 228',
        'maskflash explain causal --score "softcap(20)"',
    )
    _with_score(explain)
    _of_call(explain)
    explain.add_argument(
        "--fast-memory",
        type=_count,
        default=192,
        metavar="KIB",
        help="M of FlashAttention's theorem: a GPU's shared memory, a core's second-level cache (default: %(default)s, "
        "the paper's A100)",
    )


def _export(commands: Commands[argparse.ArgumentParser]) -> None:
    export = _of_mask(
        commands,
        "export",
        "print a mask in another engine's own form",
        f"Print a mask in the form that another engine takes, exactly, or say which row, column or pair has no such "
        f"form. Forms: {', '.join(FORMS)}. --block-size counts for those that have blocks.",
        'maskflash export "causal & document(300, 500, 224)" --to magi',
        'maskflash export "causal & document(300, 500, 224)" --to flash_attn_varlen --json',
        'maskflash export "sliding_window(256)" --to cudnn',
    )
    export.add_argument("--to", required=True, choices=FORMS, metavar="FORM", help="whose form; see above")


def _shard(commands: Commands[argparse.ArgumentParser]) -> None:
    shard = _about(
        commands,
        "shard",
        "plan which tokens each of several ranks holds",
        "Plan context parallel attention: which tokens each rank holds, what it computes, receives and sends, and how "
        "long a training step's attention takes by a model of the links. Several masks are those of a model's layers, "
        "which share one plan. Nothing runs, and no process group is needed.",
        'maskflash shard "causal & document([4096] * 16)" --world 8 --heads 32 --kv-heads 8',
        "maskflash shard causal --world 64 --tokens 1048576 --links infiniband --png plan.png",
        'maskflash shard causal "sliding_window(4096)" --layers 8 --layers 24 --world 16 --tokens 65536',
        "maskflash shard causal --world 4 --tokens 32768 --links 6.1e14,2.2e10,8e-6 --json",
        nargs="+",
    )
    shard.add_argument("--world", type=_count, required=True, metavar="N", help="ranks")
    shard.add_argument(
        "--tokens", type=_count, metavar="N", help="of the sequence (default: the longest mask's own, else 4,096)"
    )
    shard.add_argument(
        "--layers", type=_count, action="append", metavar="N", help="with each mask, in order; repeat it"
    )
    _of_sizes(shard)
    shard.add_argument("--kv-heads", type=_count, metavar="N", help="heads of k and v (default: as many as queries')")
    shard.add_argument("--head-dim", type=_count, default=128, metavar="N", help="of q, k, v (default: %(default)s)")
    shard.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of q, k and v (default: %(default)s)")
    shard.add_argument("--chunk", type=_count, metavar="N", help="ranks hold multiples of as many tokens")
    shard.add_argument(
        "--head-ranks",
        type=_count,
        metavar="N",
        help="as many ranks share heads (default: the best; 1: keys alone)",
    )
    shard.add_argument(
        "--links",
        type=_links,
        metavar="LINKS",
        help=f"{', '.join(KNOWN)}, or what you measured: FLOPS,BANDWIDTH[,LATENCY] in operations and bytes per second, "
        "and seconds (default: nvlink)",
    )
    shard.add_argument("--png", metavar="FILE", help="also draw ranks over the first mask with matplotlib")


def _bench(commands: Commands[argparse.ArgumentParser]) -> None:
    bench = _of_mask(
        commands,
        "bench",
        "time a mask on this machine, beside SDPA with the dense mask",
        "Time attention under a mask here, by turns with SDPA under the dense mask, and say the ratios' spread. The "
        "output is first held against dense float64; if it is wrong the exit status is 1.",
        'maskflash bench "causal & document(1000, 3000, 96)" --heads 8',
        'maskflash bench "sliding_window(512)" --q-len 8192 --heads 8 --backward',
        "maskflash bench causal --flex --json",
    )
    _of_call(bench)
    bench.add_argument("--rounds", type=_count, default=9, help="timings of each contender (default: %(default)s)")
    bench.add_argument("--backward", action="store_true", help="time the backward pass too")
    bench.add_argument("--flex", action="store_true", help="also compile FlexAttention, which takes a while")


def _warm(commands: Commands[argparse.ArgumentParser]) -> None:
    warm = _of_mask(
        commands,
        "warm",
        "compile the GPU's kernels ahead, into Triton's cache on disk",
        "Compile the kernels of masks for the GPU here, or for a named architecture on a machine without one, on all "
        "cores. A process that needs them later loads them. A kernel serves all lengths, batches and numbers. Without "
        f"a MASK it compiles the usual ones: {', '.join(USUAL)}.",
        "maskflash warm",
        "maskflash warm causal --head-dim 128 --heads 32 --kv-heads 8",
        "maskflash warm masks.py:packed --dtype bfloat16 --dtype float16 --forward",
        "maskflash warm --arch sm_90",
        nargs="*",
    )
    warm.set_defaults(heads=2)
    _with_score(warm)
    warm.add_argument(
        "--kv-heads", type=_count, metavar="N", help="heads of k and v (default: as many as queries', and one for all)"
    )
    warm.add_argument(
        "--head-dim", type=_count, action="append", metavar="N", help="of q, k, v; repeat it (default: 64 and 128)"
    )
    warm.add_argument("--dtype", choices=DTYPES, action="append", help="of q, k, v; repeat it (default: bfloat16)")
    warm.add_argument("--forward", action="store_true", help="leave out the gradients' kernels")
    warm.add_argument("--arch", choices=ARCHS, help="compile for this, and run nothing")
    warm.add_argument("--processes", type=_count, metavar="N", help="at once (default: the machine's cores)")


def _demo(commands: Commands[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="run packed documents through forward, backward and every check",
        description="Pack the Python standard library's source files into one sequence, compile a causal-document "
        "mask, run attention forward and backward on the CPU, check every result against a dense float64 "
        "reference, and compare time and memory with torch's SDPA under the dense mask. The mask is written as a "
        "picture, if matplotlib is there, and as a page to explore.",
    )
    demo.add_argument("--tokens", type=_count, default=8192, help="sequence length (default: %(default)s)")
    demo.add_argument("--dtype", choices=DTYPES, default="float32", help="of q, k and v (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of documents and weights (default: %(default)s)")
    demo.add_argument("--json", action="store_true", help="print the figures as JSON")
    written = demo.add_mutually_exclusive_group()
    written.add_argument(
        "--output",
        type=Path,
        default=Path("maskflash-demo"),
        metavar="FOLDER",
        help="where the picture and the explorer go (default: %(default)s)",
    )
    written.add_argument("--no-output", dest="output", action="store_const", const=None, help="write no files")


def _of_mask(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    *examples: str,
    nargs: str | int | None = None,
    tiles: bool = True,
) -> argparse.ArgumentParser:
    """A command about a mask at some lengths."""
    made = _about(commands, name, summary, description, *examples, nargs=nargs)
    made.add_argument(
        "--q-len", type=_count, metavar="N", help="queries in tokens (default: the mask's own, else 4,096)"
    )
    made.add_argument("--kv-len", type=_count, metavar="N", help="keys in tokens (default: as many as queries)")
    _of_sizes(made)
    if tiles:
        made.add_argument(
            "--block-size",
            type=_block_size,
            metavar="N[xM]",
            help="tokens of a tile, by queries and keys (default: 128)",
        )
    return made


def _about(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    *examples: str,
    nargs: str | int | None = None,
) -> argparse.ArgumentParser:
    """A command about a mask."""
    listed = "\n".join(f"  {example}" for example in examples)
    made = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, _WIDTH),
        epilog=f"{_MASK}\nExamples:\n\n{listed}\n\n{_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("mask", metavar="MASK", nargs=nargs, help="an expression of presets, or file.py:function")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def _of_sizes(command: argparse.ArgumentParser) -> None:
    """How many batch rows and heads a call has."""
    command.add_argument("--batch", type=_count, default=1, metavar="N", help="batch rows (default: %(default)s)")
    command.add_argument("--heads", type=_count, default=1, metavar="N", help="query heads (default: %(default)s)")


def _of_call(command: argparse.ArgumentParser) -> None:
    """Options of an attention call, beyond its lengths."""
    command.add_argument("--head-dim", type=_count, default=64, metavar="N", help="of q, k, v (default: %(default)s)")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of q, k and v (default: %(default)s)")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= _MOST:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to {_MOST:,}, got {text!r}")
    return count


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer from 0, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return found


def _block_size(text: str) -> tuple[int, int]:
    sides = [_count(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"expected N or NxM, got {text!r}")
    return sides[0], sides[-1]


def _links(text: str) -> Links:
    if text in KNOWN:
        return KNOWN[text]
    try:
        return Links(*map(float, text.split(",")))
    except (TypeError, ValueError) as error:
        reason = f": {error}" if isinstance(error, MaskflashError) else ""
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(KNOWN)} or FLOPS,BANDWIDTH[,LATENCY], got {text!r}{reason}"
        ) from None
