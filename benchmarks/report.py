"""Stored results -> the tables in the docs, between `<!-- figures: NAME -->` and `<!-- end figures -->`.

Run: python -m benchmarks.report (`--check` changes nothing and fails if a table is not what the results say).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks import (
    cache_accuracy,
    decode,
    flashmask,
    flex,
    forms,
    fp8_accuracy,
    gain_chart,
    gpu,
    million,
    overhead,
    runner,
    sass_model,
    scores,
    shard_tables,
    train_packed,
)
from benchmarks.compiled import arch_name
from benchmarks.runner import ROOT, Row, Spread
from maskflash.backends.triton.tiles import ROWS, Tile

RESULTS: Final = ROOT / "benchmarks" / "results"
FILES: Final = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "integrations", "numerics", "serving", "training")),
)
MISSING: Final = "TBD"
NO_GPU: Final = "Not run on a GPU: there are no figures."

_BLOCK: Final = re.compile(r"(<!-- figures: (?P<name>.+?) -->\n).*?(<!-- end figures -->)", re.DOTALL)
_QUESTIONS: Final = {
    "attention": ("documents", "efficiency"),
    "analysis": ("comparison", "lengths", "masks", "short", "joined", "start"),
    "million": tuple(million.TITLES),
    "overhead": tuple(overhead.TITLES),
    "flashmask": tuple(flashmask.TITLES),
    "flashmask_analysis": tuple(flashmask.ANALYSIS_TITLES),
    "train_packed": tuple(train_packed.TITLES),
    "flex": tuple(flex.TITLES),
    "scores": tuple(scores.TITLES),
    "decode": tuple(decode.TITLES),
    "forms": tuple(forms.TITLES),
}


class Result(NamedTuple):
    """What one script stored."""

    conditions: dict[str, Any]
    rows: list[Any]  # Row; of the model plain dicts


Results = dict[str, Result]  # by question


class Line(NamedTuple):
    """A line of the summary: which rows it quotes."""

    text: str
    question: str
    wanted: dict[str, Any]


_DOCUMENTS: Final = {"table": "documents", "case": "causal documents"}
_EFFICIENCY: Final = {"table": "efficiency", "tokens": 8192}
SUMMARY: Final = (
    Line(
        "SDPA with the dense mask / maskflash, causal documents, 8,192 tokens: forward",
        "attention",
        _DOCUMENTS | {"measure": "forward"},
    ),
    Line("the same: forward + backward", "attention", _DOCUMENTS | {"measure": "forward + backward"}),
    Line("efficiency¹, 8,192 tokens: causal", "attention", _EFFICIENCY | {"case": "causal"}),
    Line("efficiency¹, 8,192 tokens: causal documents", "attention", _EFFICIENCY | {"case": "causal documents"}),
    Line("efficiency¹, 8,192 tokens: causal window of 512", "attention", _EFFICIENCY | {"case": "causal window S/16"}),
    Line("block map of causal documents: 16,384 tokens", "analysis", {"table": "lengths", "tokens": 16384}),
    Line("the same: 1,048,576 tokens", "analysis", {"table": "lengths", "tokens": 1 << 20}),
    Line(
        "FlexAttention's eager `create_block_mask` / ours, 16,384 tokens: time",
        "analysis",
        {"table": "comparison", "measure": "time"},
    ),
    Line("the same: peak memory", "analysis", {"table": "comparison", "measure": "peak memory"}),
    Line("`import maskflash` over `import torch`", "analysis", {"table": "start", "case": "import maskflash"}),
    Line(
        "compile and first call, 1,024 tokens, imports aside",
        "analysis",
        {"table": "start", "case": "compile and first call"},
    ),
)


class Column(NamedTuple):
    """What one kind of CPU has to say in the summary."""

    heading: str
    medians: dict[str, str]  # by the line's text; lines that weren't measured there are left out


# Measured once and not stored: a folder of results of such a machine, `cpu-avx512-bf16`, takes its place.
QUOTED: Final = Column(
    "AMD EPYC (AVX512-BF16)²",
    {SUMMARY[0].text: "11.2x (float32), 9.5x (bfloat16)", SUMMARY[1].text: "11.3x (float32), 9.3x (bfloat16)"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables; the exit status is 1 if `--check` found a stale one."""
    parser = argparse.ArgumentParser(description="Write the docs' tables from the stored results.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is stale")
    check = parser.parse_args(argv).check
    results = load(RESULTS / "cpu") | load_cpus(RESULTS) | load_gpus(RESULTS)
    results |= load_model(sass_model.RESULTS) | load_shards(shard_tables.RESULTS) | load_fp8(fp8_accuracy.RESULTS)
    results |= load_caches(cache_accuracy.RESULTS)
    stale = []
    for path in FILES:
        before = path.read_text(encoding="utf-8")
        after = filled_in(before, results)
        if before != after:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path} {'is stale: run python -m benchmarks.report' if check else 'written'}")
    return 1 if check and stale else 0


def load(folder: Path) -> Results:
    """The stored results of one device; questions without any are left out."""
    results = {}
    for question in _QUESTIONS:
        path = folder / f"{question}.json"
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["conditions"]["quick"]:
                sys.exit(f"{path} comes from a --quick run, which measures nothing; run it again without")
            results[question] = Result(stored["conditions"], [_row(row) for row in stored["rows"]])
    return results


def load_cpus(folder: Path) -> Results:
    """What CPUs of other kinds stored, in folders named `cpu-...`; the summary shows them beside the first."""
    return {
        f"{question}: {path.name}": result
        for path in sorted(folder.glob("cpu-*"))
        for question, result in load(path).items()
    }


def load_gpus(folder: Path) -> Results:
    """What `benchmarks/gpu.py` stored in the folders of devices, one result for each."""
    results: Results = {}
    for path in sorted(folder.glob("*/*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["question"] == gpu.QUESTION:
            if stored["conditions"]["quick"]:
                sys.exit(f"{path} comes from a --quick run, which measures nothing; run it again without")
            where = f"{gpu.QUESTION}: {path.parent.name}/{path.name}"
            results[where] = Result(stored["conditions"], [_row(row) for row in stored["rows"]])
    return results


def load_shards(path: Path) -> Results:
    """What `benchmarks/parallel.py` stored, as it is there."""
    stored = _plain(path)
    return {"parallel": Result(stored["conditions"], stored["rows"])} if stored else {}


def load_fp8(path: Path) -> Results:
    """What `benchmarks/fp8_accuracy.py` stored: errors of out, then of gradients."""
    stored = _plain(path)
    return {f"fp8 {part}": Result(stored["conditions"], stored[part]) for part in ("rows", "gradients") if stored}


def load_caches(path: Path) -> Results:
    """What `benchmarks/cache_accuracy.py` stored: errors of steps over caches."""
    stored = _plain(path)
    return {"cache accuracy": Result(stored["conditions"], stored["rows"])} if stored else {}


def _plain(path: Path) -> dict[str, Any]:
    """What a file has; nothing if there is none."""
    if not path.exists():
        return {}
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if stored["conditions"]["quick"]:
        sys.exit(f"{path} comes from a --quick run, which predicts nothing; run it again without")
    return stored


def load_model(path: Path) -> Results:
    """What `benchmarks/sass_model.py` stored: kernels of known speed, then those of the table, as they are there."""
    stored = _plain(path)
    if not stored:
        return {}
    return {f"model {part}": Result(stored["conditions"], stored[part]) for part in ("validation", "rows")}


def filled_in(text: str, results: Results) -> str:
    """A document with each of its tables made from the results."""
    blocks = _blocks()

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{blocks[match['name']](results)}\n{match[3]}"

    return _BLOCK.sub(fill, text)


def _blocks() -> dict[str, Callable[[Results], str]]:
    """What each name stands for."""
    blocks: dict[str, Callable[[Results], str]] = {"summary": _summary, "gain": _gain}
    for question, tables in _QUESTIONS.items():
        blocks[f"{question} conditions"] = partial(_conditions, question)
        for table in tables:
            blocks[f"{question} {table}"] = partial(_table, question, table)
    blocks |= {f"flashmask {dtype}": partial(_twelve, dtype) for dtype in flashmask.DTYPES}
    blocks[gpu.QUESTION] = _gpus
    blocks |= {f"parallel {name}": partial(_sharded, name) for name in shard_tables.TABLES}
    blocks["parallel conditions"] = partial(_conditions, "parallel")
    blocks |= {
        "fp8 accuracy": _fp8,
        "fp8 gradients": _fp8_gradients,
        "fp8 conditions": partial(_conditions, "fp8 rows"),
    }
    blocks |= {"cache accuracy": _caches, "cache conditions": partial(_conditions, "cache accuracy")}
    blocks |= {"model validation": _known, "model tiles": _tiles, "model conditions": _model_conditions}
    return blocks


def _known(results: Results) -> str:
    """What the model says of kernels whose speed is known."""
    rows = results["model validation"].rows if "model validation" in results else []
    lines = [[row["name"], str(row["known"]), f"{row['predicted']:.0f}", row["use"]] for row in rows]
    return _markdown(["kernel", "known", "predicted", "used for"], lines or [[MISSING] * 4])


def _tiles(results: Results) -> str:
    """Each 16-bit row of the tile table: where it comes from, and what the model predicts of its loops."""
    found = {}
    for row in results["model rows"].rows if "model rows" in results else []:
        found[row["arch"], row["pass_name"], row["head_dim"], Tile(**row["tile"])] = row["loops"]
    lines = []
    for row in (row for row in ROWS if row.bits == 16):
        loops = found.get((row.arch, row.pass_name, row.head_dim, row.tile), [])
        speeds = [f"{loop['tflops']:.0f}" for loop in loops] or [""] * len(sass_model.WALKS)
        kernel = [arch_name(row.arch), row.pass_name, str(row.head_dim), sass_model.tile_text(row.tile)]
        lines.append([*kernel, row.source, *speeds])
    return _markdown(["for", "pass", "D", "tile", "source", *sass_model.WALKS], lines)


def _model_conditions(results: Results) -> str:
    where = results["model rows"].conditions if "model rows" in results else None
    return f"Predicted, never run; {runner.describe(where)}." if where else f"Predicted: {MISSING}."


def _fp8(results: Results) -> str:
    """A line for each kind of data, length and head dim: the error of each way to round."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in results["fp8 rows"].rows if "fp8 rows" in results else []:
        found.setdefault((row["data"], row["tokens"], row["head_dim"]), {})[row["way"]] = row
    names = [way.name for way in fp8_accuracy.WAYS]
    lines = [
        [
            data,
            f"{tokens:,}",
            str(dim),
            *(f"{ways[name]['rmse']:.2e}" for name in names),
            f"{ways[names[2]]['ratio']:.2f}x",
        ]
        for (data, tokens, dim), ways in found.items()
    ]
    columns = ["data", "tokens", "D", *names, f"{names[0]} / {names[2]}"]
    return _markdown(columns, lines or [[MISSING] * len(columns)])


def _fp8_gradients(results: Results) -> str:
    rows = results["fp8 gradients"].rows if "fp8 gradients" in results else []
    lines = [[row["given"], *(f"{row[name]:.2%}" for name in ("dq", "dk", "dv"))] for row in rows]
    return _markdown(["from", "dq", "dk", "dv"], lines or [[MISSING] * 4])


def _caches(results: Results) -> str:
    """A line for each kind of cache, a column for each kind of data."""
    rows = results["cache accuracy"].rows if "cache accuracy" in results else []
    errors = {(row["kept"], row["data"]): f"{row['rmse']:.2%}" for row in rows}
    lines = [
        [kept, *(errors.get((kept, data), MISSING) for data in cache_accuracy.DATA)] for kept in cache_accuracy.KEPT
    ]
    return _markdown(["keys and values in", *cache_accuracy.DATA], lines)


def _gpus(results: Results) -> str:
    """For each device and choice of cases, its conditions and tables."""
    parts = []
    for result in (result for where, result in results.items() if where.startswith(gpu.QUESTION)):
        parts.append(f"{runner.describe(result.conditions)}.")
        for table, title in gpu.TITLES.items():
            if rows := [row for row in result.rows if row.table == table]:
                parts += [f"{title}:", _lines(rows)]
    return "\n\n".join(parts) or NO_GPU


def _gain(results: Results) -> str:
    """The README's bars, and where they were measured."""
    bars = gain_chart.chart({question: result.rows for question, result in results.items()})
    where = (f"{title}: {_conditions(question, results)}" for title, question in gain_chart.QUESTIONS.items())
    return "\n\n".join([bars or MISSING, "\\\n".join(where)])


def _summary(results: Results) -> str:
    """The medians that say most, a column for each kind of CPU; the first has every line."""
    kinds = sorted({where.partition(": ")[2] for where in results if ": cpu-" in where})
    others = [{where.partition(": ")[0]: x for where, x in results.items() if where.endswith(f": {k}")} for k in kinds]
    columns = [_column(results), *map(_column, others)] if others else [_column(results), QUOTED]
    lines = [
        [line.text, columns[0].medians.get(line.text, MISSING), *(c.medians.get(line.text, "") for c in columns[1:])]
        for line in SUMMARY
    ]
    table = _markdown(["median", *(column.heading for column in columns)], lines)
    return "\n\n".join([table, *(_conditions("attention", each) for each in (results, *others))])


def _column(results: Results) -> Column:
    """The medians of one machine's results."""
    medians = {}
    for line in SUMMARY:
        rows = results[line.question].rows if line.question in results else []
        quoted = [row for row in rows if all(getattr(row, name) == value for name, value in line.wanted.items())]
        if quoted:
            medians[line.text] = ", ".join(_median(row) for row in quoted)
    heading = results["attention"].conditions["device"] if "attention" in results else MISSING
    return Column(heading, medians)


def _median(row: Row) -> str:
    values, unit = (row.ours, row.unit) if row.ratio is None else (row.ratio, runner.ratio_unit(row))
    text = runner.spread(Spread(values.p50, values.p50, values.p50), unit)
    return f"{text} ({row.dtype})" if row.dtype else text


def _table(question: str, table: str, results: Results) -> str:
    rows = [row for row in results[question].rows if row.table == table] if question in results else []
    if not rows:
        return _markdown(["case", "maskflash", "baseline", "ratio", "wanted"], [[MISSING] * 5])
    return _lines(rows)


def _lines(rows: Sequence[Row]) -> str:
    columns = runner.filled(rows)
    texts = [runner.cells(row) for row in rows]
    return _markdown(columns, [[text[name] for name in columns] for text in texts])


def _twelve(dtype: str, results: Results) -> str:
    """A line of medians for each of the FlashMask paper's masks."""
    rows = results["flashmask"].rows if "flashmask" in results else []
    columns, lines = flashmask.twelve(rows, dtype)
    return _markdown(columns, lines or [[MISSING] * len(columns)])


def _sharded(name: str, results: Results) -> str:
    """A table of plans of shards beside others' layouts."""
    columns, lines = shard_tables.TABLES[name][1](results["parallel"].rows if "parallel" in results else [])
    return _markdown(columns, lines or [[MISSING] * len(columns)])


def _conditions(question: str, results: Results) -> str:
    return f"{runner.describe(results[question].conditions)}." if question in results else f"Measured on: {MISSING}."


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cell for cell, _ in zip(row, columns, strict=True)) + " |" for row in rows)


def _row(stored: dict[str, Any]) -> Row:
    fields: dict[str, Any] = {name: value for name, value in stored.items() if name != "met"}
    fields |= {name: Spread(**stored[name]) for name in ("ours", "theirs", "ratio") if name in stored}
    return Row(**fields)


if __name__ == "__main__":
    sys.exit(main())
