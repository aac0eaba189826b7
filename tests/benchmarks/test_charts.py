"""Charts of stored results: each median and its spread are where the results have them, and none is left out."""

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="an extra: pip install 'maskflash[plot]'")

from benchmarks import charts


@pytest.fixture(params=charts.CHARTS)
def chart(request):
    return charts.CHARTS[request.param], charts.stored(request.param).axes[0]


def own(wanted):
    rows = json.loads((charts.RESULTS / f"{wanted.question}.json").read_text(encoding="utf-8"))["rows"]
    found = [row for row in rows if row["table"] == wanted.table]
    return [row for row in found if not wanted.measures or row["measure"] in wanted.measures]


def test_every_median_is_drawn(chart):
    wanted, ax = chart
    drawn = [line for container in ax.containers for line in [container[0]]]
    axis = 0 if wanted.over == "cases" else 1
    found = sorted(float(value) for line in drawn for value in line.get_data()[axis])
    assert found == pytest.approx(sorted(row[wanted.value]["p50"] for row in own(wanted)))
    assert found  # there are some


def test_every_spread_is_drawn(chart):
    wanted, ax = chart
    axis = 0 if wanted.over == "cases" else 1
    ends = [np.array(path)[:, axis] for container in ax.containers for path in container[2][0].get_segments()]
    expected = sorted((row[wanted.value]["p20"], row[wanted.value]["p80"]) for row in own(wanted))
    assert np.allclose(sorted(map(tuple, ends)), expected)


def test_each_case_is_in_its_own_row():
    chart = charts.CHARTS["decoding"]
    ax = charts.stored("decoding").axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    (container,) = ax.containers
    by_name = {names[round(y)]: x for x, y in zip(*container[0].get_data(), strict=True)}
    assert by_name == {f"{row['case']}, {row['tokens']:,}": row["ratio"]["p50"] for row in own(chart)}
