"""How work is spread over a device, with the numbers of devices that are not here; and what torch's settings mean."""

import contextlib
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.triton import device as triton_device
from maskflash.backends.triton import tile_choice
from maskflash.backends.triton.tile_choice import Case
from maskflash.backends.triton.tiles import AMD, SHARED_LIMITS, shared_bytes
from maskflash.cli import warm
from maskflash.cli.parser import parser

H100 = SimpleNamespace(L2_cache_size=50 << 20, multi_processor_count=132, shared_memory_per_block_optin=232_448)


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device with the numbers of an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda", 1)


@pytest.fixture
def compiled(monkeypatch):
    """Triton as it is where kernels are not interpreted."""
    library = SimpleNamespace(knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    monkeypatch.setattr(triton_device, "library", lambda: library)


def test_heads_whose_keys_fit_half_of_the_cache_run_side_by_side(gpu):
    def share(tokens, group, heads):
        return triton_device.heads_in_cache(gpu, tokens * (128 + 128) * 2, group, heads)

    assert share(8192, 1, 64) == 6  # of 4 MiB each
    assert share(8192, 8, 64) == 48  # eight query heads read one key head
    assert share(8192, 8, 16) == 16
    assert share(65536, 8, 64) == share(1 << 20, 8, 64) == 8  # no key head fits: its eight query heads
    assert share(65536, 1, 64) == 1
    assert share(65536, 8, 8) == 8
    assert triton_device.heads_in_cache(gpu, 0, 1, 5) == 5


@settings(max_examples=100)
@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 1 << 21))
def test_heads_side_by_side_are_whole_groups(group, kv_heads, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
        share, longer = (
            triton_device.heads_in_cache(torch.device("cuda", 1), n * 512, group, group * kv_heads)
            for n in (tokens, tokens + 1)
        )
    assert share % group == 0
    assert group <= longer <= share <= group * kv_heads


@pytest.mark.parametrize(
    ("group", "programs", "part"),
    [
        (8, 1000, 8),  # enough as it is
        (8, 264, 8),
        (8, 263, 4),
        (8, 64, 1),
        (6, 100, 2),  # 300 programs of two heads; of three there would be 200
        (1, 3, 1),
    ],
)
def test_a_group_is_split_until_every_processor_has_two_programs(gpu, group, programs, part):
    assert triton_device.part_of_group(gpu, group, programs) == part


def test_what_the_tile_table_asks_of_a_device(gpu, monkeypatch):
    assert triton_device.arch(gpu) == 90
    assert triton_device.shared_limit(gpu) == 232_448
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert triton_device.shared_limit(gpu) is None  # an older torch does not tell


@pytest.mark.parametrize(
    ("capability", "message"), [((7, 5), r"8.0 (Ampere) or later, got 7.5"), ((8, 0), None), ((12, 1), None)]
)
def test_what_cannot_run_says_why(gpu, compiled, monkeypatch, capability, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = triton_device.unavailable(gpu)
    assert found is None if message is None else message in found


@pytest.mark.parametrize(
    ("name", "arch", "message"),
    [
        ("gfx942:sramecc+:xnack-", "gfx942", None),
        ("gfx950:sramecc+:xnack-", "gfx950", None),
        ("gfx1200", "gfx1200", None),
        ("gfx1201", "gfx1201", None),
        ("gfx90a:sramecc+:xnack-", "gfx90a", "it serves gfx942, gfx950, gfx1200"),
    ],
)
def test_amds_gpus_are_known_by_name(gpu, compiled, monkeypatch, name, arch, message):
    """Torch for ROCm calls them CUDA devices, and gives them capabilities that say nothing."""
    properties = SimpleNamespace(gcnArchName=name, L2_cache_size=4 << 20, multi_processor_count=304)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert triton_device.arch(gpu) == arch
    found = triton_device.unavailable(gpu)
    assert found is None if message is None else message in found
    assert triton_device.shared_limit(gpu) is None  # the table knows
    assert triton_device.precision(torch.float32) == "ieee"
    if message is None:
        case = Case(gpu, "forward", torch.bfloat16, (128, 128), (128, 128), "kv=kv")
        tile = tile_choice.listed(case)
        assert shared_bytes(arch, "forward", tile, 2, 128) <= SHARED_LIMITS[AMD[arch]]
        assert "maxnreg" not in tile.options  # NVIDIA's compiler alone knows it


def test_without_triton_there_is_a_reason(monkeypatch):
    def missing():
        raise ImportError

    monkeypatch.setattr(triton_device, "library", missing)
    assert "pip install 'triton>=3.6'" in triton_device.unavailable(torch.device("cuda"))
    with pytest.raises(mf.BackendError, match=r"warm: triton is not installed; .*pip install 'triton>=3.6'"):
        warm.run(parser().parse_args(["warm", "causal", "--arch", "sm_80"]))


@pytest.fixture
def capture(gpu, monkeypatch):
    """Whether the current stream of the device records a CUDA graph; `capture[0]` may be changed."""
    state = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return state


def test_nothing_is_compiled_into_a_cuda_graph(gpu, capture, monkeypatch):
    """Triton asks its hook before it compiles; the hook of others is asked too, and stays."""
    runtime, asked = triton_device.library().knobs.runtime, []
    monkeypatch.setattr(runtime, "jit_cache_hook", lambda **given: asked.append(given))
    others = runtime.jit_cache_hook
    with triton_device.current(gpu):
        with pytest.raises(mf.BackendError, match=r"CUDA graph is being captured.*run the same call once.*`warm`"):
            runtime.jit_cache_hook(key="mine")
        capture[0] = False  # as in another thread
        assert runtime.jit_cache_hook(key="theirs") is None
    assert asked == [{"key": "theirs"}]
    assert runtime.jit_cache_hook is others
    with triton_device.current(gpu):
        assert runtime.jit_cache_hook is others


def test_what_asks_too_much_is_told_from_other_errors():
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    large = [
        OutOfResources(300_000, 200_000, "shared memory"),
        PTXASError("Internal Triton PTX codegen error"),
        RuntimeError("PassManager::run failed"),
        RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
    ]
    others = [
        CompilationError("", None, "no such thing"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        mf.BackendError("PassManager::run failed"),
        ValueError("PassManager::run failed"),
    ]
    assert [triton_device.is_too_large(error) for error in (*large, *others)] == [True] * 4 + [False] * 4


SETTINGS = {
    "": "ieee",
    'torch.set_float32_matmul_precision("high")': "tf32",
    'torch.set_float32_matmul_precision("highest")': "ieee",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    'torch.backends.cuda.matmul.fp32_precision = "tf32"': "tf32",
    'torch.backends.cuda.matmul.fp32_precision = "ieee"': "ieee",
    'torch.backends.fp32_precision = "tf32"': "tf32",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_float32_products_follow_torchs_setting():
    """Each in a process of its own, forked from one: torch refuses to go back from its new names to the old ones."""
    script = f"""
        import os, torch
        from maskflash.backends.triton.device import precision

        for setting in {list(SETTINGS)}:
            child = os.fork()
            if child == 0:
                exec(setting)
                print(precision(torch.float32), precision(torch.float16), flush=True)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0, setting
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines() == [f"{expected} ieee" for expected in SETTINGS.values()], done.stderr
