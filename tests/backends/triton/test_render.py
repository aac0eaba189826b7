"""Rendered kernels: as the golden files have them, whole Python, and dependent on a mask's structure alone."""

import ast
import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jinja2 import UndefinedError

import maskflash as mf
from maskflash.analysis.classify import classify
from maskflash.backends.triton import render as rendering
from maskflash.backends.triton import run
from maskflash.backends.triton.render import render, template_folder
from maskflash.backends.triton.signature import FEW, PASSES, ScoreKind, Specialisation, TableKind, signature
from maskflash.expr.evaluate import Inputs
from maskflash.functions.sizes import Sizes
from maskflash.scores.strength import BoundScore
from maskflash.trace.trace import trace

GOLDEN = Path(__file__).parent / "golden"


def golden_masks():
    spec = importlib.util.spec_from_file_location("golden_masks", GOLDEN / "masks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MASKS, module.SCORES


MASKS, SCORES = golden_masks()
KEPT = [
    *(("interval", pass_name) for pass_name in ("forward", "dkdv", "dq")),
    *((name, "forward") for name in MASKS),
    *(("packed", pass_name) for pass_name in ("dkdv", "dq", "delta")),
    ("causal", "dkdv"),
    ("columns", "dkdv"),
    ("interval", "hopper"),
    ("packed", "hopper"),
    *((name, pass_name) for name in ("interval", "packed") for pass_name in ("hopper_dkdv", "hopper_dq")),
    ("interval", "split"),
    ("interval", "combine"),
    ("packed", "split"),
]
KEPT_PRECISION = [("fp8", "forward")]
KEPT_SCORES = [
    ("relative", "split"),
    ("softcap", "forward"),
    ("softcap", "hopper"),
    ("softcap", "dkdv"),
    ("softcap", "hopper_dkdv"),
    ("relative", "dtables"),
]


@pytest.mark.parametrize(("name", "pass_name"), KEPT)
def test_the_text_is_the_golden_one(request, monkeypatch, name, pass_name):
    """What a change of templates or of emission does to kernels shows here; --update-golden writes them anew.

    All but "interval" are computed from expressions, as they would be if they were joined with a mask of holes.
    """
    given = {"doc": torch.zeros(2, 1024, dtype=torch.int32)} if name == "packed" else {}
    x = torch.zeros(2, 4, 1024, 64)
    if name != "interval":
        monkeypatch.setattr(run, "intervals", lambda found: None)
    text = mf.compile(MASKS.get(name, mf.causal())).source(x, x, x, pass_name=pass_name, **given)
    compare_golden(request, name, pass_name, text)


def bound(name):
    """A kept score in a call."""
    score, given = SCORES[name]
    slots, params, tables = score.bind(Sizes.checked("test", 1024, 1024, batch=2, heads=4), given)
    inputs = Inputs(slots.expr.decoded(params), tuple(tables))
    return BoundScore(slots.expr, inputs, tuple(table.requires_grad for table in tables))


@pytest.mark.parametrize(("name", "pass_name"), KEPT_SCORES)
def test_the_text_of_a_score_is_the_golden_one(request, name, pass_name):
    """Among causal pairs, which come as intervals; with dropout where it is soft-capped."""
    problem = mf.causal().at(1024, 1024, batch=2, heads=4).tiled((128, 128))
    call = problem, classify(problem), 64, 64, pass_name, bound(name)
    compare_golden(request, name, pass_name, run.source(*call, dropout=name == "softcap"))


@pytest.mark.parametrize(("name", "pass_name"), KEPT_PRECISION)
def test_the_text_of_a_precision_is_the_golden_one(request, name, pass_name):
    x = torch.zeros(2, 4, 1024, 80)
    compare_golden(
        request, name, pass_name, mf.compile(mf.causal(), precision=name).source(x, x, x, pass_name=pass_name)
    )


def test_remarks_are_of_the_function_that_was_given():
    def first(score, b, h, q, kv):
        return 7 * torch.tanh(score / 7)

    def second(score, b, h, q, kv):
        return 7 * torch.tanh(score / 7)

    q, k, v = torch.zeros(3, 1, 1, 128, 16).unbind()
    for score, other in ((first, "second"), (second, "first")):
        text = mf.compile(mf.causal(), score=score).source(q, k, v)
        assert f"# {score.__name__} (test_render.py" in text and f"# {other} (" not in text


def compare_golden(request, name, pass_name, text):
    text = re.sub(r"(\.py):\d+\)", r"\1)", text)  # the lines of masks move with whatever stands above them
    path = GOLDEN / f"{name}.{pass_name}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text, encoding="utf-8")
    assert path.exists(), "no golden file: run pytest with --update-golden"
    assert text == path.read_text(encoding="utf-8"), "run pytest with --update-golden, and read the difference"


def test_no_golden_file_is_left_over():
    assert {path.name for path in GOLDEN.glob("*.txt")} == {
        f"{name}.{pass_name}.txt" for name, pass_name in KEPT + KEPT_SCORES + KEPT_PRECISION
    }


EVERYTHING = trace(
    lambda b, h, q, kv, *, doc, n: doc[b, q] == doc[b, kv] and q - kv < n + h,
    {"doc": torch.zeros(2, 8, dtype=torch.int64), "n": 3},
).expr
KINDS = (TableKind(torch.int64, 2),)
FLAGS = (
    "narrow",
    "q_offsets",
    "kv_offsets",
    "negative_kv",
    "padded_d",
    "padded_dv",
    "products_in_8_bits",
    "pages_in_8_bits",
)


def special(**flags):
    return Specialisation(EVERYTHING, KINDS, **flags)


@pytest.mark.parametrize("pass_name", [*PASSES, *FEW])
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("others", [False, True])
def test_every_flag_gives_whole_python(pass_name, flag, others):
    flags = {name: others for name in FLAGS}
    texts = [render(special(**{**flags, flag: value}), pass_name) for value in (False, True)]
    for text in texts:
        tree = ast.parse(text)
        assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef)][-1] == pass_name
        assert "{" not in text.replace("{{", "").split("@triton.jit")[-1]
        assert not any(mark in text for mark in ("{%", "{{", "}}"))
        assert not any(line != line.rstrip() for line in text.split("\n"))
        assert "\n\n\n" not in text.split("@triton.jit")[-1]
        assert text.endswith("\n")
    alike = pass_name == "delta" or (pass_name == "combine" and flag != "padded_dv")
    assert (texts[0] == texts[1]) == alike, "a flag that changes nothing compiles twice for nothing"


@pytest.mark.parametrize("pass_name", [*PASSES, *FEW, "dtables"])
@pytest.mark.parametrize("flag", ["narrow", "near", "q_offsets", "kv_offsets", "negative_kv"])
@pytest.mark.parametrize("dropout", [False, True])
def test_every_flag_of_a_score_gives_whole_python(pass_name, flag, dropout):
    expr, kinds = bound("relative").expr, (TableKind(torch.float32, 2),)
    wanted = (pass_name == "dtables",)
    for value in (False, True):
        for mask in (special(), Specialisation(EVERYTHING, KINDS, interval=True)):
            chosen = replace(mask, score=ScoreKind(expr, kinds, wanted, **{flag: value}), dropout=dropout)
            text = render(chosen, pass_name)
            kernel = ast.parse(text).body[-1]
            arguments = [argument for line in signature(chosen, pass_name) for argument in line]
            assert [arg.arg for arg in kernel.args.args] == [argument.name for argument in arguments]
            assert not any(mark in text for mark in ("{%", "{{", "}}", "\n\n\n\n"))
            assert not any(line != line.rstrip() for line in text.split("\n"))
            assert "\n\n\n" not in text.split("@triton.jit")[-1]


@pytest.mark.parametrize("pass_name", [*PASSES, "combine"])
def test_the_interval_kernel_depends_on_nothing_of_a_mask(pass_name):
    texts = {
        render(Specialisation(EVERYTHING, KINDS, interval=True, **{flag: True}), pass_name)
        for flag in ("narrow", "q_offsets", "kv_offsets", "negative_kv")
    }
    (text,) = texts
    assert not any(name in text for name in ("kv_offset", "t0", "p0"))
    assert ast.parse(text)


@pytest.mark.parametrize("pass_name", [*PASSES, *FEW])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("interval", [False, True])
def test_the_text_takes_the_arguments_of_the_list_and_specialises_as_it_says(pass_name, offsets, interval):
    chosen = special(q_offsets=offsets, kv_offsets=offsets, interval=interval)
    tree = ast.parse(render(chosen, pass_name))
    kernel = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == pass_name)
    arguments = [argument for line in signature(chosen, pass_name) for argument in line]
    assert [arg.arg for arg in kernel.args.args] == [argument.name for argument in arguments]
    (listed,) = (ast.literal_eval(word.value) for word in kernel.decorator_list[0].keywords)
    numbers = {arg.arg for arg in kernel.args.args if isinstance(arg.annotation, ast.Constant)}
    views = (
        set()
        if pass_name in ("delta", "combine") or interval
        else {"t0", *(["q_offset", "kv_offset"] if offsets else [])}
    )
    assert len(listed) == len(set(listed))
    assert set(listed) == numbers | views
    constants = {arg.arg for arg in kernel.args.args if isinstance(arg.annotation, ast.Attribute)}
    assert constants == {argument.name for argument in arguments if argument.kind == "constant"}
    assert all(name.isupper() for name in constants)


def test_what_a_template_misses_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "delta.py.jinja").write_text("x = {{ no_such_hole }}\n")
    monkeypatch.setattr(rendering, "template_folder", lambda: tmp_path)
    rendering._environment.cache_clear()
    try:
        with pytest.raises(UndefinedError, match="no_such_hole"):
            render(special(), "delta")
    finally:
        rendering._environment.cache_clear()


def laid_out(folder, monkeypatch):
    """As if the package lay in a folder."""
    package = folder / "maskflash"
    (package / "codegen").mkdir(parents=True)
    monkeypatch.setattr(rendering, "__file__", str(package / "backends" / "triton" / "render.py"))
    return package


def test_an_installed_package_has_its_own_templates(tmp_path, monkeypatch):
    package = laid_out(tmp_path, monkeypatch)
    (package / "templates").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "templates").mkdir()
    assert template_folder() == package / "templates"


def test_a_checkout_has_them_at_its_top(tmp_path, monkeypatch):
    laid_out(tmp_path, monkeypatch)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "templates").mkdir()
    assert template_folder() == tmp_path / "templates"


def test_a_foreign_folder_beside_the_package_is_not_taken(tmp_path, monkeypatch):
    package = laid_out(tmp_path, monkeypatch)
    (tmp_path / "templates").mkdir()  # site-packages/templates may be anybody's
    with pytest.raises(mf.BackendError) as caught:
        template_folder()
    assert str(package / "templates") in str(caught.value)
    assert str(tmp_path / "templates") in str(caught.value)
    assert "reinstall" in str(caught.value)


def test_importing_the_package_needs_no_jinja():
    script = "import sys, maskflash; print([name for name in ('jinja2', 'triton') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
