"""The demo's steps in order: pack, analyse, run, check, time, weigh, report, draw."""

import json
import sys
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import maskflash as mf
from maskflash.demo.checks import check_block_map, check_results
from maskflash.demo.documents import pack
from maskflash.demo.drawings import draw, make_folder
from maskflash.demo.measure import PAIRS, analysis_seconds, compare_times, peak_bytes
from maskflash.demo.report import Report
from maskflash.demo.workload import CONTENDERS, HEADS, SCALE, build, dense_mask, packed

_NO_PICTURE: Final = "none: it needs matplotlib, pip install 'maskflash[plot]'"


def run(*, tokens: int, dtype: str, seed: int, output: Path | None, as_json: bool) -> int:
    """Do the whole job, print what it found, and name the files that show it.

    Args:
        tokens: length of the sequence.
        dtype: name of a torch dtype, such as "float32".
        seed: of documents and weights.
        output: a folder for the picture and the explorer, made if it isn't there; None writes none.
        as_json: print JSON instead of a table.

    Returns:
        0 if every check passed, else 1.
    """
    if output is not None:
        make_folder(output)  # first: a folder that can't be is better known before the work than after
    report = _measured(tokens, getattr(torch, dtype), seed)
    drawings = draw(report.documents, output) if output is not None else {}
    if as_json:
        print(json.dumps(report.to_dict() | drawings, indent=2))
    else:
        report.print(Console())
        if drawings:
            print(f"picture   {drawings['picture'] or _NO_PICTURE}")
            print(f"explorer  {drawings['explorer']}  (open it in a browser)")
    for check in report.checks:
        if not check.passed:
            print(f"check failed: {check.name}: {check.error:.3g} > {check.budget:.3g}", file=sys.stderr)
    return 0 if report.passed else 1


def _measured(tokens: int, dtype: torch.dtype, seed: int) -> Report:
    console = Console(stderr=True)
    columns = TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn()
    said = set[str]()

    def say(description: str) -> None:
        if not console.is_terminal and description not in said:  # a log has no bar that moves
            console.print(description)
        said.add(description)

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        say("packing documents")
        bar = progress.add_task("packing documents", total=2 + HEADS + PAIRS + 1 + len(CONTENDERS))

        def step(description: str) -> None:
            progress.update(bar, advance=1, description=description)
            say(description)

        documents = pack(tokens, seed)
        work = build(documents, dtype, seed)
        mask = dense_mask(work.ids)
        step("analysing the mask")
        analysis, block_map = analysis_seconds(work.ids)

        step("checking against float64")
        attn = mf.compile(packed, scale=SCALE, backend="cpu")
        out, lse = attn(work.q, work.k, work.v, doc=work.ids, return_lse=True)
        gradients = torch.autograd.grad((out, lse), (work.q, work.k, work.v), (work.dout, work.dlse))
        results = (out.detach(), lse.detach(), *gradients)
        checks = check_results(results, work, mask, lambda: step("checking against float64"))
        checks.append(check_block_map(block_map, mask))

        times = compare_times(work, lambda: step("timing beside SDPA"))
        peaks = {}
        for name in CONTENDERS:
            progress.update(bar, description=f"peak memory of {name}")
            say(f"peak memory of {name}")
            peaks[name] = peak_bytes(name, tokens, dtype, seed)
            progress.advance(bar)
    return Report(
        documents=documents,
        dtype=dtype,
        seed=seed,
        density=mask.float().mean().item(),
        tiles=block_map.counts,
        analysis=analysis,
        times=times,
        peaks=peaks,
        checks=checks,
    )
