"""Nothing is rendered or compiled again for another length, window, offset, number or table."""

import pytest
import torch

import maskflash as mf
from maskflash.backends.triton import device as triton_device
from maskflash.testing import Shape
from tests.backends.triton.conftest import in_a_process

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of NaN and infinities


def varied(device):
    """Calls that differ in numbers alone: (q, k, v), then what is given by name."""

    @mf.mask
    def packed(b, h, q, kv, *, ids, window, slope):
        return 0 <= q - kv < window and ids[b, q] == ids[b, kv] and kv * slope < 9

    def call(batch, heads, kv_heads, length, kv_len, window, q_offset, seed, ids=torch.int64, dim=16, slope=0.5):
        shape = Shape(batch, heads, kv_heads, length, kv_len, dim, dim)
        q, k, v = shape.tensors(torch.float16, seed=seed, device=device)
        size = max(length + 20, kv_len)
        table = torch.arange(batch * size, device=device).view(batch, size).to(ids) // (3 + seed)
        if isinstance(q_offset, list):
            q_offset = torch.tensor(q_offset, device=device)
        out = mf.attention(
            q, k, v, packed, block_size=16, backend="triton", q_offset=q_offset, ids=table, window=window, slope=slope
        )
        out.sum().backward()

    return call


def test_another_number_renders_imports_and_compiles_nothing(device, compiled, monkeypatch, by_expression):
    rendered, loaded, keys = compiled
    call = varied(device)
    call(1, 4, 2, 20, 20, 5, 0, seed=0)
    assert len(rendered) == len(loaded) == len(keys) == 4  # forward, delta, dk and dv, dq
    for part in (1, 2):  # how many of a group one program sums depends on lengths
        monkeypatch.setattr(triton_device, "part_of_group", lambda device, group, programs, part=part: part)
        for arguments in [
            (1, 4, 2, 20, 20, 6, 0),
            (1, 4, 2, 20, 20, 0, 0),
            (1, 4, 2, 20, 20, 1, 0),
            (1, 4, 2, 33, 20, 5, 0),
            (1, 4, 2, 16, 32, 5, 0),
            (1, 4, 2, 1, 1, 5, 0),
            (1, 4, 2, 20, 20, 5, 7),
            (3, 6, 3, 20, 20, 5, 0),
            (1, 4, 1, 20, 20, 5, 0),
        ]:
            call(*arguments, seed=1)
    for slope in (0.0, -0.0, 0.25, -3.5, float("inf"), 1e-300):
        call(1, 4, 2, 20, 20, 5, 0, seed=1, slope=slope)
    assert len(rendered) == len(loaded) == len(keys) == 4


def test_a_function_that_moves_in_its_file_compiles_nothing(compiled, small, tmp_path):
    text = "def stripes(b, h, q, kv):\n    return (q + kv) % 3 == 0\n"
    for number, above in enumerate(("", "\n\n")):
        path = tmp_path / f"masks_{number}.py"
        path.write_text(above + text)
        names = {}
        exec(compile(path.read_text(), str(path), "exec"), names)
        attn = mf.compile(names["stripes"], backend="triton", block_size=16)
        attn(*small(length=20)).sum().backward()
        assert f"# stripes ({path.name}:{2 + len(above)}): q + kv" in attn.source(*small(length=20))
    rendered, loaded, keys = compiled
    assert len(rendered) == len(loaded) == len(keys) == 4


@pytest.mark.parametrize(
    ("change", "renders", "compiles"),
    [
        ({"ids": torch.int32}, 3, 3),  # delta knows no mask
        ({"q_offset": [7]}, 3, 3),
        ({"dim": 8}, 3, 4),
        ({"heads": 2}, 0, 1),  # no group: dK and dV need no sums, and are written as they are wanted
    ],
)
def test_another_structure_renders_and_compiles_once(device, compiled, change, renders, compiles, by_expression):
    rendered, _, keys = compiled
    call = varied(device)
    first = {"batch": 1, "heads": 4, "kv_heads": 2, "length": 20, "kv_len": 20, "window": 5, "q_offset": 0}
    call(**first, seed=0)
    assert len(rendered) == len(keys) == 4
    call(**{**first, **change}, seed=0)
    assert (len(rendered), len(keys)) == (4 + renders, 4 + compiles)
    again = {"q_offset": [3, 9], "batch": 2} if "q_offset" in change else {"length": 33}
    call(**{**first, **change, **again}, seed=1)
    assert (len(rendered), len(keys)) == (4 + renders, 4 + compiles)
    if "dim" in change:
        call(**{**first, "dim": 12}, seed=0)  # is filled up to 16
        assert (len(rendered), len(keys)) == (4 + renders, 4 + compiles)


def test_triton_compiles_no_number_into_a_kernel():
    """Every number has a type of its own and is not specialised; pointers and capital constants are what is left."""
    out = in_a_process("""
        import torch, maskflash as mf
        from maskflash.backends.triton import modules
        from maskflash.backends.triton.render import render
        from maskflash.backends.triton.signature import PASSES, Specialisation, TableKind

        ids, spans = torch.zeros(2, 8, dtype=torch.int32), torch.zeros(4)
        for window in (3, 5):
            mask = mf.mask(lambda b, h, q, kv: q - kv < window and ids[b, q] == ids[b, kv] and spans[h] < q)
            problem = mask.at(8, 8, batch=2, heads=4).tiled((16, 16))
            tables = tuple(map(TableKind.of, problem.inputs.tables))
            for flags in ({}, {"q_offsets": True, "kv_offsets": True}, {"interval": True}):
                special = Specialisation(problem.expr, tables, **flags)
                for name in PASSES:
                    kernel = getattr(modules.load(render(special, name)), name)
                    for param in kernel.params:
                        free = param.do_not_specialize
                        kind = "constant" if param.is_constexpr else param.annotation_type or "pointer"
                        print(name, param.name, kind, free)
        print(len(modules._modules))
    """)
    *lines, modules = out.splitlines()
    assert modules == "10"  # three each, and delta: another window is the same text
    seen = set()
    for line in lines:
        _, name, kind, free = line.split()
        seen.add(kind)
        if kind == "constant":
            assert name.isupper(), line
        elif (name.startswith("t") and name[1:].isdigit()) or (name in ("q_offset", "kv_offset") and kind == "pointer"):
            assert free == "True", line  # a table may lie at any address: new ones are views as often as not
        elif kind == "pointer":
            assert name.endswith("_ptr") or name in {*WALKS, "intervals"}, line
        else:
            assert kind in ("i32", "i64", "fp32"), line
            assert free == "True", line
    assert seen >= {"constant", "pointer", "i64", "fp32"}


WALKS = {"order", *(f"{kind}_{what}" for kind in ("full", "partial") for what in ("offsets", "tiles", "start", "stop"))}
