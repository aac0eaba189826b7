"""Each script runs and fills its rows, and the docs' tables come from stored results; no timing is asserted."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from benchmarks import (
    analysis,
    attention,
    decode,
    flashmask,
    flex,
    forms,
    gain_chart,
    million,
    overhead,
    packed_model,
    report,
    runner,
    scores,
    train_packed,
    workloads,
)
from benchmarks.flex_masks import mask_mod
from benchmarks.runner import Row, Spread


def assert_plausible(rows, titles):
    assert {row.table for row in rows} == set(titles)
    for row in rows:
        for values in (row.ours, row.theirs, row.ratio):
            assert values is None or 0 < values.p20 <= values.p50 <= values.p80
        assert (row.theirs is None) == (row.ratio is None)
        assert row.met is None  # a quick run measures nothing


def test_attention_fills_every_row(tmp_path, capsys):
    stored = tmp_path / "attention.json"
    rows = attention.main(["--cpu", "--quick", "--json", str(stored)])
    assert_plausible(rows, attention.TITLES)
    cases = {(row.table, row.case, row.dtype, row.measure) for row in rows}
    assert {
        ("documents", "causal documents", dtype, m) for dtype in attention.DTYPES for m in attention.MEASURES
    } < cases
    assert {("efficiency", *key, "forward") for key in attention.EFFICIENCY_FLOORS} < cases
    assert all(0 < row.visited <= 1 for row in rows if row.table == "efficiency")
    result = json.loads(stored.read_text())
    assert len(result["rows"]) == len(rows)
    assert set(result["conditions"]["versions"]) == {"maskflash", "torch", "python"}
    assert result["conditions"]["quick"]
    assert "a quick run" in capsys.readouterr().out


def test_attention_names_its_device(capsys):
    with pytest.raises(SystemExit) as stop:
        attention.main(["--quick"])
    assert stop.value.code == 2
    assert "--cpu" in capsys.readouterr().err


def test_analysis_fills_every_row(capsys):
    rows = analysis.main(["--quick"])
    assert_plausible(rows, analysis.TITLES)
    assert [row.measure for row in rows if row.table == "comparison"] == ["time", "peak memory"]
    assert [row.case for row in rows if row.table == "start"] == ["import maskflash", "compile and first call"]
    assert "a quick run" in capsys.readouterr().out


def test_forms_fill_every_row(capsys):
    rows = forms.main(["--quick"])
    assert_plausible(rows, forms.TITLES)
    assert [row.case for row in rows] == 2 * list(forms.FORMS)
    assert "a quick run" in capsys.readouterr().out


def test_decode_fills_every_row(capsys):
    rows = decode.main(["--quick"])
    assert_plausible(rows, decode.TITLES)
    assert "a quick run" in capsys.readouterr().out


@pytest.mark.parametrize("case", decode.CASES, ids=lambda case: f"{case.name} {case.tokens}")
def test_decode_compares_the_same_attention(case):
    case = case._replace(tokens=min(case.tokens, 600))
    k, v = torch.randn(2, case.batch, decode.KV_HEADS, case.tokens + 8, decode.HEAD_DIM).unbind()
    (q, keys, values, place), (mask, args) = next(decode.steps(case, k, v)), case.mask(case)
    visible = mf.mask(mask).dense(case.rows, keys.shape[2], batch=case.batch, q_offset=place, **args)
    theirs = scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=True)
    torch.testing.assert_close(mf.attention(q, keys, values, mask, q_offset=place, **args), theirs)


def test_overhead_fills_every_row(capsys):
    rows = overhead.main(["--quick"])
    assert_plausible([row for row in rows if row.theirs], overhead.TITLES)  # a difference of times may have any sign
    assert [row.measure for row in rows] == ["by turns", "longer, by turns", "in a loop", "longer, in a loop"] * 6
    assert "a quick run" in capsys.readouterr().out


def test_overhead_compares_the_same_attention():
    q, k, v = (torch.randn(1, overhead.HEADS, overhead.TOKENS, overhead.HEAD_DIM) for _ in range(3))
    for _, ours, dense in overhead.cases(q, k, v):
        torch.testing.assert_close(ours(), torch.nn.functional.scaled_dot_product_attention(q, k, v, **dense))


def test_million_fills_every_row(capsys):
    rows = analysis.main(["--million", "--quick"])
    assert_plausible(rows, million.TITLES)
    assert {row.case for row in rows if row.table == "million"} == set(million.TIME_CEILINGS)
    assert "a quick run" in capsys.readouterr().out


def test_flashmask_fills_every_row(tmp_path, capsys):
    stored = tmp_path / "flashmask.json"
    names = ["causal", "random_eviction"]
    rows = flashmask.main(["--quick", "--no-flex", "--details", "--masks", *names, "--json", str(stored)])
    assert_plausible(rows, {"maps", "dense", "efficiency"})
    assert {row.case for row in rows} == set(names)
    assert [row.measure for row in rows if row.case == "causal" and row.table == "maps"] == list(flashmask.SOURCES)
    for table in ("dense", "efficiency"):
        kinds = [(row.measure, row.dtype) for row in rows if row.case == "causal" and row.table == table]
        assert set(kinds) == set(flashmask.EFFICIENCY_FLOORS)
    assert {row.tiles for row in rows if row.case == "causal" and row.tiles} == {"1 / 2 / 1"}
    assert "a quick run" in capsys.readouterr().out
    plain = json.loads(stored.read_text())
    assert len(plain["rows"]) == len(rows)
    plain["conditions"]["quick"] = False
    stored.write_text(json.dumps(plain))
    columns, *lines = flashmask_table(tmp_path)
    assert [line[0] for line in lines] == names
    assert all(len(line) == len(columns) for line in lines)
    assert lines[0][columns.index("x FlexAttention, forward")] == ""


def flashmask_table(folder):
    """The twelve-row table of the docs, from results stored in a folder."""
    text = report.filled_in("<!-- figures: flashmask float32 -->\n<!-- end figures -->", report.load(folder))
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:3] not in ("<!-", "| -")
    ]


def test_flashmask_analysis_fills_every_row(capsys):
    rows = flashmask.main(["--quick", "--analysis", "--masks", "document", "qk_sparse"])
    assert_plausible(rows, flashmask.ANALYSIS_TITLES)
    cases = [(row.case, row.measure) for row in rows if row.table == "comparison"]
    every = ["document", "qk_sparse", "all of these"]
    assert cases == [(case, source) for case in every for source in flashmask.SOURCES]
    total = next(row for row in rows if row.case == "all of these")
    assert total.theirs.p50 == pytest.approx(sum(r.theirs.p50 for r in rows[:4:2]))
    assert "a quick run" in capsys.readouterr().out


def test_scores_fill_their_rows(capsys):
    rows = scores.main(["--quick", "--no-flex"])
    assert_plausible([row for row in rows if row.unit == "s"], ("alone", "dense"))
    assert [row.measure for row in rows if row.unit == "B"] == ["peak memory"]


def test_flex_fills_its_row(capsys):
    assert_plausible(flex.main(["--quick"]), flex.TITLES)
    assert "a quick run" in capsys.readouterr().out


def test_training_has_the_losses_of_dense_masks_and_independent_documents(tmp_path, capsys):
    stored = tmp_path / "train_packed.json"
    rows = train_packed.main(["--quick", "--json", str(stored)])
    assert {row.table for row in rows} == set(train_packed.TITLES)
    *curve, apart = (row for row in rows if row.table == "loss")
    assert len(curve) == train_packed.LINES
    assert all(row.ours.p50 == pytest.approx(row.theirs.p50, rel=1e-4) for row in curve)
    assert curve[-1].ours.p50 < curve[0].ours.p50 - 1  # it learns
    assert apart.ours.p50 < 1e-4
    (independence,) = (row for row in rows if row.table == "independence")
    assert independence.samples > 1
    assert independence.ours == independence.theirs == Spread(0, 0, 0)
    assert len(json.loads(stored.read_text())["rows"]) == len(rows)
    assert "a quick run" in capsys.readouterr().out


def test_the_check_of_independence_can_fail():
    """Without documents in the mask, a document's bytes reach those after it."""
    model = packed_model.Gpt(2048)
    batch = train_packed.of_several(2048, 0)
    counts = train_packed._changed(model, mf.compile(mf.causal()), batch)
    assert counts[0] > 0
    assert counts[-1] == 0  # nothing comes after the last


def test_packed_sequences_hold_documents_and_no_targets_across_them():
    batch = next(packed_model.batches(2048, 0))
    assert sum(batch.lengths) == 2048
    ends = torch.tensor(batch.lengths).cumsum(0) - 1
    assert (batch.targets[0, ends] == -100).all()
    inside = batch.targets[0] != -100
    assert int((~inside).sum()) == len(batch.lengths)
    assert torch.equal(batch.targets[0][inside], batch.tokens[0].roll(-1)[inside])
    assert torch.equal(batch.positions[0] == 0, torch.cat((torch.tensor([True]), batch.document().diff() > 0)))
    text = bytes(batch.tokens[0].tolist())
    starts = [0, *(ends + 1).tolist()[:-1]]
    assert all(text[start:].startswith((b"def ", b"class ")) for start in starts)
    other = next(packed_model.batches(2048, 1))
    assert not torch.equal(other.tokens, batch.tokens)


def test_without_a_compiler_the_table_says_so(monkeypatch, capsys):
    def refused(*args, **kwargs):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(flashmask, "_compiled", lambda: refused)
    rows = flashmask.main(["--quick", "--masks", "full"])
    assert {row.ratio for row in rows if row.table == "flex"} == {None}
    printed = capsys.readouterr()
    assert printed.out.count(flashmask.NOT_COMPILED) == len(flashmask.DTYPES)
    assert "FlexAttention, full, float32: no compiler\n" in printed.err


@pytest.mark.parametrize("name", mf.presets.PAPER)
def test_flex_attention_is_given_the_same_masks(name):
    mask = mf.presets.paper(name, 200, seed=3, heads=2)
    b, h, q, kv = torch.zeros(1, 1, 1, 1).long(), *torch.meshgrid(*map(torch.arange, (2, 200, 200)), indexing="ij")
    found = mask_mod(mask)(b, h, q, kv).expand(1, 2, 200, 200)
    assert torch.equal(found, mask.predicate.dense(200, 200, heads=2))


def test_the_contenders_alternate_and_their_samples_stay_paired():
    order = []

    def contender(name, seconds):
        def run():
            order.append(name)
            return (seconds, 2 * seconds)

        return run

    ours, theirs = runner.alternate(contender("ours", 1.0), contender("theirs", 3.0), 2)
    assert order == ["ours", "theirs", "ours", "theirs", "theirs", "ours"]  # a warm-up, then two pairs
    assert (ours, theirs) == ([[1.0, 1.0], [2.0, 2.0]], [[3.0, 3.0], [6.0, 6.0]])
    ours, theirs = runner.alternate(contender("ours", 1.0), contender("theirs", 3.0), 2, seconds=0)
    assert (ours, theirs) == ([[1.0], [2.0]], [[3.0], [6.0]])  # one turn at least


def test_a_disturbed_sample_is_taken_again(monkeypatch):
    monkeypatch.setattr(runner, "_NOTICEABLE", -1.0)
    others, runs = iter([0.0, *[9.0] * 8, *[18.0] * 2, *[27.0] * 2, 36.0]), iter(range(9))
    monkeypatch.setattr(runner, "_others", lambda: next(others))
    ours, theirs = runner.alternate(lambda: (next(runs),), lambda: (next(runs),), 2)
    assert ours == [[3, 8]]  # the second try; the last of three
    assert theirs == [[4, 5]]


def test_what_others_use_is_seen():
    before = runner._others()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert runner._others() > before


def test_the_spread_of_a_ratio_is_that_of_the_pairs():
    row = runner.compared("t", "c", 1, "time", [1.0, 2.0, 4.0], [2.0, 4.0, 8.0], visited=0.5, floor=1.0)
    assert row.ratio == Spread(1.0, 1.0, 1.0)
    assert row.met
    assert runner.wanted(row) == ">= 1.00, met"
    assert runner.wanted(runner.alone("t", "c", 1, "time", [0.2], ceiling=0.15)) == "<= 150 ms, not met"


@pytest.mark.parametrize(
    ("values", "unit", "text"),
    [
        (Spread(0.0101, 0.0123, 0.0222), "s", "12.3 ms (10.1-22.2)"),
        (Spread(0.9, 1.5, 1.5), "s", "1.50 s (0.900-1.50)"),
        (Spread(2.0**20, 2.0**20, 2.0**20), "B", "1.00 MiB"),
        (Spread(99.0, 123.4, 1234.5), "x", "123x (99.0-1,234)"),
        (Spread(0.8, 0.876, 0.9), "", "0.88 (0.80-0.90)"),
    ],
)
def test_figures_show_three_digits(values, unit, text):
    assert runner.spread(values, unit) == text


def test_documents_fill_the_sequence():
    lengths = workloads.document_lengths(8192, seed=0)
    assert sum(lengths) == 8192
    assert all(workloads.SHORTEST <= length <= workloads.LONGEST for length in lengths[:-1])
    assert len(workloads.document_ids(8192, seed=0)) == 8192


def test_the_docs_hold_what_the_results_say():
    assert report.main(["--check"]) == 0


def test_errors_of_caches_come_from_their_results():
    rows = [{"kept": "bfloat16", "data": "normal", "rmse": 0.125}]
    text = "<!-- figures: cache accuracy -->\nstale\n<!-- end figures -->"
    filled = report.filled_in(text, {"cache accuracy": report.Result({}, rows)})
    assert f"| bfloat16 | 12.50% | {report.MISSING} | {report.MISSING} |" in filled and "stale" not in filled


def test_stored_results_become_tables(tmp_path):
    ratio = Spread(11.0, 12.0, 13.0)
    row = Row("documents", "causal documents", 8192, "forward", "float32", "s", 9, ratio, ratio, ratio, floor=10.0)
    stored = {name: getattr(row, name) for name in Row.__slots__ if getattr(row, name) is not None}
    plain = json.loads(json.dumps(stored, default=lambda x: {"p20": x.p20, "p50": x.p50, "p80": x.p80}))
    result = {"question": "attention", "conditions": runner.conditions(False), "rows": [{**plain, "met": True}]}
    (tmp_path / "attention.json").write_text(json.dumps(result))
    text = "before\n<!-- figures: attention documents -->\nstale\n<!-- end figures -->\nafter"
    filled = report.filled_in(text, report.load(tmp_path))
    assert "stale" not in filled
    assert ">= 10.0x, met" in filled
    assert filled.startswith("before\n") and filled.endswith("\nafter")
    assert report.MISSING in report.filled_in(text, {})


def test_every_line_of_the_summary_can_be_found():
    """A row that a script no longer makes would stay TBD for ever."""
    made = {
        "attention": [
            Row(table, case, 8192, measure, "float32", "s", 1, Spread(1, 1, 1))
            for table, cases, measures in (
                ("documents", ["causal documents"], attention.MEASURES),
                ("efficiency", workloads.masks(8192, 0), ["forward"]),
            )
            for case in cases
            for measure in measures
        ],
        "analysis": [
            *(Row("lengths", "causal documents", n, "time", "", "s", 1, Spread(1, 1, 1)) for n in analysis.LENGTHS),
            *(Row("comparison", "", 0, m, "", "s", 1, Spread(1, 1, 1)) for m in ("time", "peak memory")),
            *(
                Row("start", c, 0, "", "", "s", 1, Spread(1, 1, 1))
                for c in ("import maskflash", "compile and first call")
            ),
        ],
    }
    results = {question: report.Result(runner.conditions(False), rows) for question, rows in made.items()}
    text = report.filled_in("<!-- figures: summary -->\n<!-- end figures -->", results)
    assert report.MISSING not in text


def test_the_summary_shows_kinds_of_cpu_side_by_side(tmp_path):
    row = Row("documents", "causal documents", 8192, "forward", "float32", "s", 1, *[Spread(7, 7, 7)] * 3)
    first = {"attention": report.Result(runner.conditions(False) | {"device": "One"}, [row])}
    text = "<!-- figures: summary -->\n<!-- end figures -->"
    quoted = report.filled_in(text, first)
    assert f"| median | One | {report.QUOTED.heading} |" in quoted
    assert "| 7.00x (float32) | 11.2x (float32), 9.5x (bfloat16) |" in quoted
    two = runner.conditions(False) | {"device": "Two"}
    runner.store(tmp_path / "cpu-two" / "attention.json", "attention", two, [replace(row, ratio=Spread(8, 8, 8))])
    stored = report.filled_in(text, first | report.load_cpus(tmp_path))
    assert "| median | One | Two |" in stored
    assert "| 7.00x (float32) | 8.00x (float32) |" in stored
    assert report.QUOTED.heading not in stored
    assert stored.count("; commit ") == 2


def test_bars_are_as_long_as_times_are():
    row = Row("documents", "causal documents", 8192, "forward", "float32", "s", 1, Spread(1, 1, 1), Spread(4, 4, 4))
    other = replace(row, dtype="bfloat16")
    dense, ours = gain_chart.chart({"attention": [other, row]}).splitlines()
    assert (dense.count("█"), ours.count("█")) == (gain_chart.BARS, gain_chart.BARS // 4)
    assert dense.endswith("4.00 s") and ours.endswith("1.00 s")
    assert gain_chart.chart({}) == ""


@pytest.mark.parametrize(("amx", "bf16", "text"), [(1, 1, "AMX"), (0, 1, "AVX512-BF16"), (0, 0, "without AMX")])
def test_a_cpu_is_named_by_what_the_planner_looks_at(monkeypatch, amx, bf16, text):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(bf16))
    assert f"{torch.backends.cpu.get_cpu_capability()}, " in runner._cpu_name()
    assert text in runner._cpu_name()


def test_a_quick_run_is_no_result(tmp_path):
    result = {"question": "analysis", "conditions": runner.conditions(True), "rows": []}
    (tmp_path / "analysis.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="quick"):
        report.load(tmp_path)
