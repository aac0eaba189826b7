"""Which kernel runs forward, by what is asked for and what serves the call; and that it is told."""

from types import SimpleNamespace

import pytest
import torch

import maskflash as mf
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import kernel_choice
from maskflash.errors import BackendError
from maskflash.scores.strength import Strength


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    """A device of compute capability 9.0, which doesn't interpret; nothing in the environment."""
    monkeypatch.setattr(gpu, "arch", lambda device: 90)
    monkeypatch.setattr(gpu, "interprets", lambda: False)
    monkeypatch.delenv(kernel_choice.VARIABLE, raising=False)


def chosen(kernels="auto", precision="full", dtype=torch.bfloat16):
    x = torch.empty(1, 2, 256, 64, dtype=dtype)
    problem = mf.causal().at(256, 256, batch=1, heads=2).tiled((128, 128))
    return kernel_choice.choose(problem, x, x, x, Strength(1.0, kernels=kernels, precision=precision))


def test_nobody_gets_hopper_s_own_who_does_not_ask():
    assert chosen() == ("forward", "since no other has been measured on a GPU")


@pytest.mark.parametrize(("kernels", "pass_name"), [("portable", "forward"), ("hopper", "hopper")])
def test_what_is_asked_for_runs(monkeypatch, kernels, pass_name):
    for variable in ("", "auto", "portable", "hopper"):
        monkeypatch.setenv(kernel_choice.VARIABLE, variable)
        assert chosen(kernels) == (pass_name, "as asked for")


def test_what_is_asked_for_and_does_not_serve_the_call_is_refused():
    with pytest.raises(
        BackendError, match=r'kernels is "hopper".*float16 and bfloat16, got float32; leave kernels out'
    ):
        chosen("hopper", dtype=torch.float32)
    with pytest.raises(BackendError, match='got precision="fp8"'):
        chosen("hopper", precision="fp8")


def test_the_environment_decides_for_who_does_not_ask(monkeypatch):
    monkeypatch.setenv(kernel_choice.VARIABLE, "hopper")
    assert chosen() == ("hopper", "as MASKFLASH_KERNELS=hopper says")
    name, why = chosen(dtype=torch.float32)
    assert name == "forward"
    assert "doesn't serve this call: it computes in float16 and bfloat16, got float32" in why
    monkeypatch.setenv(kernel_choice.VARIABLE, "portable")
    assert chosen() == ("forward", "as MASKFLASH_KERNELS=portable says")
    monkeypatch.setenv(kernel_choice.VARIABLE, "ampere")
    with pytest.raises(BackendError, match="MASKFLASH_KERNELS is 'ampere', expected one of auto, portable, hopper"):
        chosen()


@pytest.mark.parametrize(
    ("kernels", "q_len", "words"),
    [
        ("auto", 256, "the portable kernel, since no other has been measured on a GPU, in the dtype of q, k and v"),
        (
            "hopper",
            256,
            "Hopper's own kernel for float16 and bfloat16 up to head dim 256, as asked for, in the dtype of q, k and v",
        ),
        ("hopper", 1, "the kernel of few rows, since rows are few, in the dtype of q, k and v"),
    ],
)
def test_an_explanation_names_it(monkeypatch, kernels, q_len, words):
    monkeypatch.setattr(gpu, "unavailable", lambda device: None)
    monkeypatch.setattr("maskflash.backends.triton.run.unavailable", lambda device: None)
    attn = mf.compile(mf.causal(), backend="triton", kernels=kernels)
    assert words in str(attn.explain(q_len, 256, q_offset=256 - q_len))


def test_an_explanation_says_what_a_call_would_be_told(monkeypatch):
    monkeypatch.setattr("maskflash.backends.triton.run.unavailable", lambda device: None)
    monkeypatch.setattr(gpu, "arch", lambda device: 80)
    said = str(mf.compile(mf.causal(), backend="triton", kernels="hopper").explain(256, 256))
    assert "none, since a call raises: attention: " in said
    assert "compute capability 9.0, got 8.0" in said


@pytest.mark.parametrize(
    ("q_len", "block_size", "words"),
    [
        (256, 128, "the portable kernel, since no other has been measured on a GPU, in 8 bits"),
        (1, 128, 'precision="fp8" can\'t serve this call: of 1 queries'),
        (256, (64, 256), "32, 64 or 128 keys, got block_size (64, 256)"),
    ],
)
def test_an_explanation_says_what_a_call_in_8_bits_would(monkeypatch, q_len, block_size, words):
    monkeypatch.setattr("maskflash.backends.triton.run.unavailable", lambda device: None)
    attn = mf.compile(mf.causal(), backend="triton", precision="fp8", block_size=block_size)
    assert words in str(attn.explain(q_len, 256, q_offset=256 - q_len))


def text(name, dtype=torch.bfloat16, block_size=128, **how):
    """Whose text `source` shows."""
    q, k, v = torch.zeros(3, 1, 2, 256, 64, dtype=dtype).unbind()
    source = mf.compile(mf.causal(), block_size=block_size, kernels=name).source(q, k, v, **how)
    return "hopper" if "def hopper(" in source else "split" if "def split(" in source else "portable"


def test_the_text_is_of_what_runs(monkeypatch):
    """By the rule of calls; a machine without a GPU shows what a GPU that suits would run."""
    for arch in (90, 80):
        monkeypatch.setattr(gpu, "arch", lambda device, arch=arch: arch)
        assert text("hopper") == text("hopper", pass_name="hopper") == "hopper"
        assert text("auto") == text("portable") == "portable"
    monkeypatch.setenv(kernel_choice.VARIABLE, "hopper")
    assert text("auto") == "hopper"
    assert text("portable") == text("auto", dtype=torch.float32) == "portable"
    monkeypatch.delenv(kernel_choice.VARIABLE)
    for call in ({"dtype": torch.float32}, {"block_size": (64, 64)}):
        with pytest.raises(BackendError, match="doesn't serve this call"):
            text("hopper", **call)


def test_the_text_on_a_gpu_is_that_of_this_gpu():
    x = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16)
    problem = mf.causal().at(256, 256, batch=1, heads=2).tiled((128, 128))
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), block_size=problem.block_size)
    assert kernel_choice.of_text(on_gpu, x, x, "hopper", "full").pass_name == "hopper"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "arch", lambda device: 80)
        assert kernel_choice.of_text(problem, x, x, "hopper", "full").pass_name == "hopper"
        with pytest.raises(BackendError, match=r"9\.0, got 8\.0"):
            kernel_choice.of_text(on_gpu, x, x, "hopper", "full")


def test_few_rows_show_their_own_text():
    q, k, v = (torch.zeros(1, 2, n, 64, dtype=torch.bfloat16) for n in (1, 256, 256))
    assert "def split(" in mf.compile(mf.causal(), kernels="hopper").source(q, k, v, q_offset=255)


def backward(kernels="auto", dtype=torch.bfloat16, dim=64):
    x = torch.empty(1, 2, 256, dim, dtype=dtype)
    problem = mf.causal().at(256, 256, batch=1, heads=2).tiled((128, 128))
    return kernel_choice.choose_backward(problem, x, x, Strength(1.0, kernels=kernels))


def test_which_kernels_run_backward(monkeypatch):
    assert backward() == (False, "since no other has been measured on a GPU")
    assert backward("portable") == (False, "as asked for")
    assert backward("hopper") == (True, "as asked for")
    monkeypatch.setenv(kernel_choice.VARIABLE, "hopper")
    assert backward() == (True, "as MASKFLASH_KERNELS=hopper says")
    assert backward("portable") == (False, "as asked for")
    monkeypatch.setenv(kernel_choice.VARIABLE, "portable")
    assert backward() == (False, "as MASKFLASH_KERNELS=portable says")


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_backward_that_hopper_s_own_does_not_serve_is_the_portable_one_s(monkeypatch, by_environment):
    if by_environment:
        monkeypatch.setenv(kernel_choice.VARIABLE, "hopper")
    wanted = (False, "since Hopper's own doesn't serve this call: it serves head dims to 128, got 256")
    assert backward("auto" if by_environment else "hopper", dim=256) == wanted


@pytest.mark.parametrize(
    ("kernels", "block_size", "words"),
    [
        ("auto", 128, "the portable kernels, since no other has been measured on a GPU"),
        ("hopper", 128, "Hopper's own kernels for float16 and bfloat16 up to head dim 128, as asked for"),
        ("hopper", (128, 64), "the portable kernels, since Hopper's own doesn't serve this call: it needs tiles of"),
    ],
)
def test_an_explanation_names_those_of_the_backward(monkeypatch, kernels, block_size, words):
    monkeypatch.setattr("maskflash.backends.triton.run.unavailable", lambda device: None)
    attn = mf.compile(mf.causal(), backend="triton", kernels=kernels, block_size=block_size)
    told = attn.explain(256, 256)
    assert f"backward by        {words}" in str(told)
    assert words.startswith(told.to_dict()["backward"]["kernel"])


def test_an_explanation_of_a_call_that_raises_names_none(monkeypatch):
    monkeypatch.setattr("maskflash.backends.triton.run.unavailable", lambda device: None)
    told = mf.compile(mf.causal(), backend="triton", kernels="hopper", block_size=64).explain(256, 256)
    assert told.to_dict()["forward"]["kernel"] == "none"
    assert told.to_dict()["backward"] is None


def test_nobody_asks_what_hopper_s_own_serve_where_nobody_wants_them(monkeypatch):
    """To ask loads Gluon, a tenth of a first call."""

    def asked(*call):
        raise AssertionError("asked")

    monkeypatch.setattr(kernel_choice.hopper, "why_not", asked)
    assert chosen().pass_name == chosen("portable").pass_name == "forward"
    assert not backward().own
    with pytest.raises(AssertionError, match="asked"):
        chosen("hopper")
