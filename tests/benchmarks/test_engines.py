"""The benchmark of other libraries' engines: a line for each pass, also where there is nothing to measure."""

from benchmarks import engines
from benchmarks.engines import Job


def test_a_line_says_how_long_a_pass_took_or_why_not():
    job = Job("auto", "causal documents", 64, 2, 16)
    (found,) = engines.results_of(job)
    assert found["seconds"] > 0
    assert (found["backend"], found["mask"], found["pass"]) == ("auto", "causal documents", "forward")
    (failed,) = engines.results_of(job._replace(backend="cudnn"))
    assert "seconds" not in failed
    assert failed["failed"].startswith("BackendError: attention: the cudnn engine can't run here")
