"""The cost model's rates: what they make of work and bytes, and what is no rate."""

import pytest

import maskflash as mf
from maskflash.parallel.links import KNOWN, Links


def test_work_and_bytes_take_time():
    links = Links(flops=1e12, bandwidth=1e9, latency=1e-3)
    assert links.compute(1e9, 100, backward=False) == pytest.approx(4 * 1e9 * 100 / 1e12)
    assert links.compute(1e9, 100, backward=True) == pytest.approx(2.5 * 4 * 1e9 * 100 / 1e12)
    assert links.transfer(3e9, 2e9, 7) == pytest.approx(3 + 7e-3)
    assert links.transfer(2e9, 3e9, 7) == pytest.approx(3 + 7e-3), "both ways at once"


def test_links_have_names():
    assert Links.of(None) is KNOWN["nvlink"] and Links.of("cpu") is KNOWN["cpu"]
    own = Links(1e12, 1e9)
    assert Links.of(own) is own
    rates = [KNOWN[name].bandwidth for name in ("nvlink", "infiniband", "cpu")]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"flops": 0, "bandwidth": 1}, mf.ArgumentError, r"Links: flops is 0, expected a finite number above 0"),
        ({"flops": 1, "bandwidth": -2}, mf.ArgumentError, r"Links: bandwidth is -2, expected a finite number above 0"),
        ({"flops": float("nan"), "bandwidth": 1}, mf.ArgumentError, r"Links: flops is nan"),
        ({"flops": 1, "bandwidth": float("inf")}, mf.ArgumentError, r"Links: bandwidth is inf"),
        ({"flops": 1, "bandwidth": 1, "latency": -1}, mf.ArgumentError, r"latency is -1, .* number at least 0"),
        ({"flops": "1", "bandwidth": 1}, mf.ArgumentTypeError, r"Links: flops is a str, expected a number"),
        ({"flops": True, "bandwidth": 1}, mf.ArgumentTypeError, r"Links: flops is a bool"),
    ],
)
def test_what_is_no_rate(given, error, message):
    with pytest.raises(error, match=message):
        Links(**given)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("ethernet", mf.ArgumentError, r'Links: the name is .ethernet., expected "nvlink", "infiniband" or "cpu"'),
        (3, mf.ArgumentTypeError, r"Links: links is 3, expected a Links; measure Links\(flops=, bandwidth=\)"),
    ],
)
def test_what_are_no_links(given, error, message):
    with pytest.raises(error, match=message):
        Links.of(given)
    with pytest.raises(error, match=message):
        mf.parallel.plan(mf.causal(), 128, 2, links=given)
