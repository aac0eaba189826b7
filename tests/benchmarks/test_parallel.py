"""Simulated shards: known anchors, others' layouts as they are meant, counts beside the plan's own, tables, a chart."""

import json

import numpy as np
import pytest
import torch

import maskflash as mf
from benchmarks import parallel, report, shard_tables
from benchmarks.balancers import BALANCERS, Layout, _needed, visited_tiles
from benchmarks.sharding import LAYER, gathered, needed, ring
from maskflash.parallel.links import KNOWN

SIZES = {"heads": LAYER.heads, "kv_heads": LAYER.kv_heads, "head_dim": LAYER.head_dim}


def laid_out(name, tokens, ranks, balancer):
    case = parallel.case_of(name, tokens)
    shards = BALANCERS[balancer](case.layout, ranks)
    return case, shards, needed(case.judged(shards), shards)


def of_a_gather(step, tokens, ranks):
    """Bytes received forward on average."""
    return step.forward.received.mean() / (tokens * (ranks - 1) / ranks * LAYER.key)


def test_causal_by_head_and_tail_needs_three_quarters_of_a_gather_at_eight_ranks():
    case, shards, step = laid_out("causal", 65_536, 8, "head and tail")
    assert of_a_gather(step, 65_536, 8) == 0.75
    assert step.imbalance == 1
    assert of_a_gather(gathered(case.layout.needs, shards), 65_536, 8) == 1
    assert of_a_gather(ring(case.layout.needs, shards), 65_536, 8) == 1


@pytest.mark.parametrize(
    ("name", "balancer", "imbalance", "part"),
    [
        ("causal", "contiguous", 1.875, 0.5),
        ("causal", "round robin", 1.0, 0.99),
        ("causal", "heap, 2048", 1.0, 0.875),
        ("16K question, 12 answers", "contiguous", 1.161, 0.23),
        ("16K question, 12 answers", "round robin", 1.0, 0.55),
        ("window of 1,024", "contiguous", 1.008, 0.016),
        ("window of 1,024", "head and tail", 1.008, 0.03),
    ],
)
def test_layouts_are_worth_what_earlier_simulations_found(name, balancer, imbalance, part):
    _, _, step = laid_out(name, 65_536, 8, balancer)
    assert step.imbalance == pytest.approx(imbalance, abs=5e-4)
    assert of_a_gather(step, 65_536, 8) == pytest.approx(part, abs=5e-3)


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("name", ["13 causal documents", "share_question"])
def test_every_token_is_on_one_rank_and_counts_are_those_of_all_pairs(name, balancer):
    case = parallel.case_of(name, 4096)
    shards = BALANCERS[balancer](case.layout, 2)
    if shards is None:
        assert case.documents is None and balancer.startswith("per document")
        return
    held = np.full(4096, -1)
    for rank, ranges in enumerate(shards):
        for start, stop in ranges:
            assert (held[start:stop] == -1).all()
            held[start:stop] = rank
    assert np.bincount(held).tolist() == [2048, 2048]
    step, dense = needed(case.judged(shards), shards), case.mask.dense(4096, 4096)[0, 0].numpy()
    sees = [dense[held == rank] for rank in range(2)]
    assert step.work.tolist() == [LAYER.heads * int(x.sum()) for x in sees]
    foreign = [int((x.any(0) & (held != rank)).sum()) for rank, x in enumerate(sees)]
    assert step.forward.received.tolist() == [LAYER.key * x for x in foreign]


def test_documents_cut_as_they_lie_are_unbalanced_and_dealt_to_all_ranks_are_not():
    """What torch 2.13 cuts, and what its per-document balancer means."""
    assert laid_out("13 causal documents", 65_536, 8, "per document, as cut")[2].imbalance > 1.5
    assert laid_out("13 causal documents", 65_536, 8, "per document")[2].imbalance == 1


def test_balancers_refuse_what_they_cannot_divide():
    case = parallel.Case("odd", 1000, mf.causal())
    refused = {name for name, balancer in BALANCERS.items() if balancer(case.layout, 3) is None}
    assert refused == set(BALANCERS) - {"contiguous"}


def test_affinity_keeps_documents_together():
    apart, together = (
        laid_out("13 causal documents", 65_536, 8, name)[2] for name in ("heap, 512", "affine heap, 512")
    )
    assert together.forward.received.sum() < apart.forward.received.sum() / 2
    assert together.imbalance < 1.05


@pytest.mark.parametrize("name", ["causal", "prefix trees", "random_eviction"])
def test_needed_keys_of_chunks_and_visited_tiles_are_those_of_all_pairs(name):
    case = parallel.case_of(name, 2048)
    dense = case.mask.dense(2048, 2048)[0, 0]
    needs = dense.reshape(4, 512, 4, 512).any(1).sum(2)
    assert _needed(case.layout.needs, 512).tolist() == needs.tolist()
    tiles = dense.reshape(16, 128, 16, 128).any(3).any(1).sum(1)
    assert visited_tiles(case.mask.block_map(2048, 2048)).tolist() == tiles.tolist()
    assert isinstance(case.layout, Layout)


@pytest.mark.parametrize("links", KNOWN)
@pytest.mark.parametrize("name", ["causal", "13 causal documents", "sliding_window"])
def test_a_plan_says_of_itself_what_is_counted_here(name, links):
    case = parallel.case_of(name, 8192)
    plan = mf.parallel.plan(case.mask, 8192, 4, links=links, **SIZES)
    step = needed(case.judged(plan.shards), plan.shards, plan.head_ranks)
    assert plan.seconds == pytest.approx(step.seconds(KNOWN[links]))
    assert plan.work == pytest.approx(step.work)
    for ours, counted in ((plan.forward, step.forward), (plan.backward, step.backward)):
        assert ours.received == pytest.approx(counted.received)
        assert ours.sent == pytest.approx(counted.sent)
        assert ours.messages == pytest.approx(counted.messages)


def test_heads_are_exchanged_for_tokens_with_the_bytes_of_ulysses():
    """Each of W ranks receives (W - 1) / W of its own S / W tokens' q, k, v and out."""
    case, shards, _ = laid_out("causal", 4096, 4, "contiguous")
    step = needed(case.layout.needs, shards, 4)
    token = LAYER.itemsize * LAYER.head_dim * (2 * LAYER.heads + 2 * LAYER.kv_heads)
    assert step.forward.received.tolist() == step.backward.sent.tolist() == [3 / 4 * 1024 * token] * 4
    assert step.imbalance == 1


def test_the_script_runs_and_the_docs_get_its_tables_and_chart(tmp_path, capsys):
    stored = tmp_path / "parallel.json"
    rows = parallel.main(["--quick", "--mask", "causal", "--mask", "13 causal documents", "--json", str(stored)])
    said = capsys.readouterr().out
    assert "a quick run" in said
    names = {row["by"] for row in rows if row["table"] == "grid"}
    assert {f"plan, {link}" for link in KNOWN} | set(BALANCERS) | {"Ulysses", "ring: zigzag"} < names
    for row in rows:
        assert row["imbalance"] >= 1 and min(row["milliseconds"].values()) > 0
    plain = json.loads(stored.read_text())
    with pytest.raises(SystemExit, match="--quick run"):
        report.load_shards(stored)
    plain["conditions"]["quick"] = False
    stored.write_text(json.dumps(plain))
    results = report.load_shards(stored)
    for name in shard_tables.TABLES:
        text = report.filled_in(f"<!-- figures: parallel {name} -->\n<!-- end figures -->", results)
        assert (report.MISSING in text) == (name == "balance")  # which is of another size


def test_a_run_goes_on_where_another_stopped(tmp_path, capsys, monkeypatch):
    stored = tmp_path / "parallel.json"
    quick = ["--quick", "--mask", "causal", "--json", str(stored)]
    parallel.main([*quick, "--ranks", "4"])
    first = json.loads(stored.read_text())["rows"]
    assert {row["ranks"] for row in first} == {4} and {row["table"] for row in first} == {"grid", "frontier"}
    made = []
    monkeypatch.setattr(parallel, "steps", lambda case, ranks, links: made.append(ranks) or iter(()))
    parallel.main([*quick, "--ranks", "2"])
    assert made == [2] and json.loads(stored.read_text())["rows"] == first, "rows of other ranks stay"
    capsys.readouterr()


def test_goals_can_be_missed():
    """Figures of a plan beside a balancer that is better in both."""
    row = {"table": "grid", "mask": "13 causal documents", "tokens": 65_536, "ranks": 8, "planning": 3.0}
    row |= {"milliseconds": dict.fromkeys(KNOWN, 1.0)}
    gather = 65_536 * 7 / 8 * LAYER.key
    figures = {"plan, nvlink": (1.1, 0.5), "heap, 128": (1.0, 0.4)}
    rows = [
        {**row, "by": name, "imbalance": imbalance, "forward bytes": [part * gather, 0, part * gather * 8]}
        for name, (imbalance, part) in figures.items()
    ]
    goals = {line[0]: line[2] for line in shard_tables.goals(rows)[1]}
    assert list(goals.values()) == [
        "not run",
        "0 of 1 balanced, 0 of the others sooner done, with up to 1.100",
        "1.25 in all, 1.25 at most",
        "not run",
        "1 of 1: heap, 128",
        "not run",
        "not run",
    ]
    rows[1]["milliseconds"] = dict.fromkeys(KNOWN, 1.1)  # what is balanced takes longer
    assert shard_tables.goals(rows)[1][1][2] == "0 of 1 balanced, 1 of the others sooner done, with up to 1.100"


def test_the_frontier_has_a_panel_for_each_mask():
    pytest.importorskip("matplotlib", reason="an extra: pip install 'maskflash[plot]'")
    case = parallel.case_of("16K question, 12 answers", 65_536)
    shards = BALANCERS["contiguous"](case.layout, 8)
    step = needed(case.layout.needs, shards)
    rows = [parallel.row(table, case, 8, by, step, 0.1) for table, by in (("grid", "contiguous"), ("frontier", "plan"))]
    (panel,) = shard_tables.frontier(rows).axes
    assert panel.get_title() == case.name
    assert [line.get_label() for line in panel.lines] == ["contiguous", "plans"]
    assert {round(float(line.get_ydata()[0]), 3) for line in panel.lines} == {1.161}


def test_prefix_trees_are_what_packing_gives():
    """A row sees its path: whoever is seen sees no more than the row does."""
    dense = parallel.prefix_trees(1024, 0).dense(1024, 1024)[0, 0]
    assert dense.diagonal().all()
    for q in torch.arange(0, 1024, 37):
        path = dense[q].nonzero().flatten()
        assert (dense[path].int().cumsum(1)[:, q] == torch.arange(1, len(path) + 1)).all()
