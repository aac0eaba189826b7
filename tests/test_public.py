"""What an editor shows a user: names that are for use, no others, and for each a sentence that says what it is for."""

import inspect
import re
import textwrap
from difflib import SequenceMatcher
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import maskflash as mf
from maskflash import parallel, presets, scores, testing, visualize

MODULES = (mf, parallel, presets, scores, testing, visualize)
REFERENCE = (Path(__file__).parents[1] / "docs" / "reference.md").read_text(encoding="utf-8")
OF_MODULES = {"__doc__", "__file__", "__name__", "__path__", "__version__"}
PUBLIC = {f"{module.__name__}.{name}": getattr(module, name) for module in MODULES for name in module.__all__}


def tokens(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def objects():
    """An object of each public class that has members, by the class's name in the reference."""
    mask = mf.causal()
    plan = parallel.plan(mask, 1024, 2)
    layer = plan.layers[0]
    attn = mf.compile(mask, score=lambda score, b, h, q, kv: score + q)
    return {
        "Attention": attn,
        "BlockMap": mask.block_map(64, 64),
        "BlockRows": mask.to_block_rows(64, 64),
        "BlockSparse": mask.to_block_sparse(64, 64),
        "ColumnIntervals": mask.to_flashmask(64, 64),
        "Comparison": mf.equivalent(mask, mask, 64, 64),
        "CuteMask": mask.to_cute(64, 64),
        "Explanation": attn.explain(64, 64),
        "Mask": mask,
        "PackedMask": mask.to_packed_mask(64, 64),
        "PageTable": mf.PageTable(tokens(2, 3), tokens(2), page_size=16),
        "PrefixRanges": mask.to_prefix_ranges(64, 64),
        "PrefixTree": mf.prefix_tree([[1, 2], [1, 3]]),
        "Relation": mf.compare(mask, mask, 64, 64),
        "RowIntervals": mask.to_row_intervals(64, 64),
        "Score": scores.softcap(2.0),
        "Sight": mask.at(64, 64),
        "Slices": mask.to_slices(64, 64),
        "Why": mask.why(3, 2),
        "parallel.Candidate": plan.tried[0],
        "parallel.Links": parallel.Links(1e12, 1e9),
        "parallel.PlannedLayer": layer,
        "parallel.PlannedPass": layer.forward,
        "parallel.ShardPlan": plan,
        "parallel.ShardedAttention": parallel.compile(mask, parallel.plan(mask, 1024, 1)),
        "presets.PaperMask": presets.paper("causal", 1024),
        "testing.Shape": testing.Shape(),
    }


OBJECTS = objects()


def attributes(kind):
    """What a class's docstring lists under "Attributes:"."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    return set(re.findall(r"^    (\w+): ", section.partition("\n\n")[0], re.MULTILINE))


def documented(name):
    """What the reference shows of a class: the members that it lists, or all that have a docstring, and attributes."""
    found = re.search(rf"^::: maskflash\.{re.escape(name)}\n((?:    .*\n)*)", REFERENCE, re.MULTILINE)
    options = ((found and yaml.safe_load(found[1])) or {}).get("options", {})  # none in that of its module
    kind = PUBLIC[f"maskflash.{name}"]
    own = kind.__mro__ if options.get("inherited_members") else (kind,)
    methods = {member for base in own[: own.index(object) if object in own else 1] for member in vars(base)}
    methods = {member for member in methods if not member.startswith("_") and inspect.getdoc(getattr(kind, member))}
    methods = {member for member in methods if not inspect.ismemberdescriptor(getattr(kind, member))}
    listed = {member for member in options.get("members", methods) if not member.startswith("_")}
    bases = [base for base in OBJECTS if issubclass(kind, PUBLIC[f"maskflash.{base}"]) and base != name]
    return listed.union(attributes(kind), *map(documented, bases))


def sentence(doc):
    """The first sentence of a docstring, on one line."""
    return re.split(r"(?<=[.?!])\s", " ".join(doc.split()))[0]


def says_nothing(name, doc):
    """Whether a first sentence only repeats the name: "Causal document." of causal_document."""
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).replace("_", " ").lower()
    said = re.sub(r"[^a-z ]", "", sentence(doc).lower()).removeprefix("the ").removeprefix("a ")
    return len(said.split()) < 3 or SequenceMatcher(None, words, said).ratio() > 0.8


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_completion_shows_a_module_s_own_names_alone(module):
    assert set(dir(module)) - OF_MODULES == set(module.__all__)
    assert all(hasattr(module, name) for name in dir(module))


def test_every_public_class_has_an_object_here():
    kinds = {name.removeprefix("maskflash.") for name, value in PUBLIC.items() if isinstance(value, type)}
    errors = {name for name in kinds if issubclass(PUBLIC[f"maskflash.{name}"], BaseException)}
    assert kinds - errors == OBJECTS.keys()


@pytest.mark.parametrize("name", OBJECTS)
def test_completion_shows_what_the_reference_has_of_an_object(name):
    value = OBJECTS[name]
    assert isinstance(value, PUBLIC[f"maskflash.{name}"])
    assert {member for member in dir(value) if not member.startswith("_")} == documented(name)
    assert all(hasattr(value, member) for member in dir(value))


def test_every_mask_shows_the_same_whatever_made_it():
    made = (mf.causal() & mf.full(), ~mf.causal(), mf.mask(lambda b, h, q, kv: q > kv), mf.document([3, 4]))
    made += (mf.from_row_intervals(mf.causal().to_row_intervals(8, 8)), mf.from_arguments("flash_attn", causal=True))
    assert {tuple(dir(mask)) for mask in made} == {tuple(dir(mf.causal()))}
    assert set(dir(presets.tree([-1, 0]))) - set(dir(mf.causal())) == {"depths", "parents"}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_says_first_what_it_is_for(name):
    value = PUBLIC[name]
    if isinstance(value, ModuleType | type) or callable(value):
        assert not says_nothing(name.rpartition(".")[2], inspect.getdoc(value) or "")


@pytest.mark.parametrize("name", OBJECTS)
def test_every_member_says_first_what_it_is_for(name):
    kind = PUBLIC[f"maskflash.{name}"]
    methods = documented(name) - attributes(kind)
    assert [x for x in sorted(methods) if says_nothing(x, inspect.getdoc(getattr(kind, x)) or "")] == []


def test_a_sentence_that_says_nothing_is_found():
    assert says_nothing("causal_document", "Causal document.")
    assert says_nothing("BlockMap", "The block map.\n\nMore.")
    assert says_nothing("causal", "")
    assert not says_nothing("causal", "Every query sees itself and what comes before it.")


def test_the_package_s_own_page_leads_by_what_people_want():
    shown = inspect.getdoc(mf)
    assert shown is not None
    used = set(re.findall(r"\bmf\.(\w+)", shown))
    assert {module.__name__.rpartition(".")[2] for module in MODULES[1:]} | {"compile", "mask", "attention"} <= used
    assert used <= set(mf.__all__)
    code = "".join(line + "\n" for line in shown.splitlines() if line.startswith("    ")).partition("    attend")[0]
    exec(textwrap.dedent(code), {})
