"""Masks as CuTe text: computed by the dialect's rules, or by CuTe itself where it is installed, for every pair."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import masks
from tests.forms.dialect import shown

LENGTH = st.integers(0, 40)
GOLDEN = """\
import cutlass
import cutlass.cute as cute


@cute.jit
def mask_mod(batch, head, m_idx, n_idx, seqlen_info, aux_tensors, aux_scalars):
    b = cutlass.Int32(batch[0])
    q = cutlass.Int32(m_idx[0])
    kv = cutlass.Int32(n_idx[0])
    q = q + aux_scalars[0]
    x3 = q >= kv
    x4_0 = cutlass.min(b, cutlass.Int32(aux_tensors[0].shape[0] - 1))
    x4_1 = cutlass.min(q, cutlass.Int32(aux_tensors[0].shape[1] - 1))
    x4 = cutlass.Int32(aux_tensors[0][x4_0, x4_1])
    x5_0 = cutlass.min(b, cutlass.Int32(aux_tensors[0].shape[0] - 1))
    x5_1 = cutlass.min(kv, cutlass.Int32(aux_tensors[0].shape[1] - 1))
    x5 = cutlass.Int32(aux_tensors[0][x5_0, x5_1])
    x6 = x4 == x5
    x7 = x3 & x6
    visible = cute.make_rmem_tensor(1, cutlass.Boolean)
    visible[0] = x7
    return visible.load()
"""


def test_the_text_of_packed_documents():
    doc = torch.tensor([[0] * 30 + [1] * 34])
    form = mf.mask(lambda b, h, q, kv: q >= kv and doc[b, q] == doc[b, kv]).to_cute(32, 64, q_offset=32)
    assert form.text == GOLDEN
    assert form.scalars == (("Int32", 32),)
    assert [table.data_ptr() for table in form.aux_tensors] == [doc.data_ptr()]


@settings(max_examples=150)
@given(masks(), LENGTH, LENGTH, st.integers(0, 24), st.booleans())
def test_the_function_is_the_mask(mask, q_len, kv_len, offset, each):
    sizes = {"batch": 2, "heads": 2, "q_offset": torch.tensor([offset, 0]) if each else offset}
    form = mask.to_cute(q_len, kv_len, **sizes)
    assert torch.equal(shown(form, (2, 2, q_len, kv_len)), mask.dense(q_len, kv_len, **sizes))


DRAW = torch.Generator().manual_seed(0)


def whole(dtype, low, high):
    return torch.randint(low, high, (32,), generator=DRAW, dtype=dtype)


I8, U8, I16 = whole(torch.int8, -128, 128), whole(torch.uint8, 0, 256), whole(torch.int16, -(2**15), 2**15)
I32, I64, SMALL = (whole(torch.int64, -n, n) for n in (2**31, 2**62, 9))
I32 = I32.int()
TRUE = torch.rand(32, generator=DRAW) < 0.5
F32, F64 = torch.randn(32, generator=DRAW), torch.randn(32, generator=DRAW, dtype=torch.float64)
F32[3:5] = torch.tensor([torch.nan, torch.inf])
F16, BF16 = F32.half(), F32.bfloat16()
TWO, ONE, NOBODY = SMALL.view(4, 8), torch.tensor(3), torch.zeros(0, dtype=torch.int64)
PREDICATES = {
    "quotients": lambda b, h, q, kv: (q - 7) // (kv - 9 if kv != 9 else 1) > 0,
    "remainders": lambda b, h, q, kv: (q - 12) % 5 == (kv - 20) % -3 + 2,
    "remainders of tables": lambda b, h, q, kv: q % (kv + 1) == SMALL[kv] % 7,
    "towards zero": lambda b, h, q, kv: torch.div(SMALL[q], 3, rounding_mode="trunc") == torch.fmod(SMALL[kv], 4),
    "shifts": lambda b, h, q, kv: (SMALL[q] << (kv % 5)) >> 1 > SMALL[kv],
    "shifts too far": lambda b, h, q, kv: (SMALL[q] << SMALL[kv]) > (SMALL[kv] >> SMALL[q]),
    "int8": lambda b, h, q, kv: I8[q] + I8[kv] > I8[q] * I8[kv],
    "int8, one": lambda b, h, q, kv: (-I8[q] < I8[kv]) ^ (abs(I8[q]) > I8[kv]) ^ (~I8[q] == I8[kv]),
    "int8, divided": lambda b, h, q, kv: (I8[q] // (I8[kv] | 1)) > I8[q] % (I8[kv] | 1),
    "uint8": lambda b, h, q, kv: (U8[q] - U8[kv] < U8[q] * U8[kv]) ^ (~U8[q] > U8[kv]) ^ (-U8[q] > U8[kv]),
    "uint8, divided": lambda b, h, q, kv: (U8[q] // (U8[kv] | 1)) + (U8[q] % (U8[kv] | 1)) > (U8[q] >> 1),
    "int16": lambda b, h, q, kv: I16[q] * I16[kv] > I16[kv] << 3,
    "int32": lambda b, h, q, kv: I32[q] + I32[kv] > I32[q] * 3,
    "int64": lambda b, h, q, kv: (
        (I64[q] + I64[kv] > I64[q] * 3) ^ (I64[q] // (SMALL[kv] | 1) < I64[kv] % (SMALL[q] | 1))
    ),
    "promoted": lambda b, h, q, kv: I8[q] + I64[kv] > U8[q] * I32[kv],
    "truths": lambda b, h, q, kv: (TRUE[q] < TRUE[kv]) ^ (TRUE[q] == TRUE[kv]) ^ (TRUE[q] & TRUE[kv]) ^ ~TRUE[q],
    "truths counted": lambda b, h, q, kv: (TRUE[q] * TRUE[kv] + TRUE[q] > 0) ^ (TRUE[q] + SMALL[kv] > 3),
    "chosen": lambda b, h, q, kv: torch.where(TRUE[kv], SMALL[q], q) > kv,
    "float32": lambda b, h, q, kv: (F32[q] * 2.5 > F32[kv]) ^ (F32[q] + F32[kv] - 0.5 > -F32[kv]),
    "float64": lambda b, h, q, kv: (F64[q] < F32[kv]) ^ (F64[q] * SMALL[kv] < q),
    "halves": lambda b, h, q, kv: (F16[q] < F16[kv]) ^ (BF16[q] >= BF16[kv]) ^ (F16[q] < BF16[kv]),
    "rounded": lambda b, h, q, kv: torch.ceil(SMALL[q]) == torch.round(SMALL[kv]),
    "least": lambda b, h, q, kv: max(min(q, kv), 3) == abs(q - kv),
    "strided": lambda b, h, q, kv: TWO[q // 8, kv % 8] > TWO.T[-1 - kv % 8, q % 4 - 4],
    "one number": lambda b, h, q, kv: q >= kv * ONE and TRUE[3] | (ONE > 2),
    "guarded": lambda b, h, q, kv: (
        q < 5 or (SMALL[q - 5] > 0 and (kv == 0 or q % kv == 0)) or (q > 99 and NOBODY[q] > 0)
    ),
    "nested": lambda b, h, q, kv: SMALL[abs(SMALL[q])] > SMALL[abs(SMALL[kv])],
    "units": lambda b, h, q, kv: q * (b + 1) + h >= kv,
    "constants": lambda b, h, q, kv: True,
    "bits": lambda b, h, q, kv: ((q ^ kv) & 5 | 2) == (~kv & 7),
    "wide": lambda b, h, q, kv: q * 2**40 + kv > kv * 2**40 - 3,
}
SHAPE = (2, 2, 24, 24)


def form_of(name):
    mask = mf.mask(PREDICATES[name])
    return mask.to_cute(24, 24, batch=2, heads=2), mask.dense(24, 24, batch=2, heads=2)


@pytest.mark.parametrize("name", PREDICATES)
def test_every_operation_is_torchs(name):
    form, dense = form_of(name)
    assert torch.equal(shown(form, SHAPE), dense)


def test_other_numbers_are_the_same_text():
    texts = {mf.sliding_window(n, 3).to_cute(64, 64, q_offset=n).text for n in (1, 7, 50)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("predicate", "said"),
    [
        (lambda b, h, q, kv: torch.sqrt(F32[q]) > kv, "`sqrt` for float32"),
        (lambda b, h, q, kv: F32[q] * F32[kv] + 1 > 0, "`mul of a sum` for float32"),
        (lambda b, h, q, kv: F32[q].long() > kv, "`cast` for float32"),
        (lambda b, h, q, kv: F16[q] + F16[kv] > 0, "`add` for float16"),
        (lambda b, h, q, kv: torch.minimum(F32[q], F32[kv]) > 0, "`min` for float32"),
    ],
)
def test_what_cute_may_compute_otherwise_is_refused(predicate, said):
    with pytest.raises(mf.UnsupportedMask, match=said):
        mf.mask(predicate).to_cute(24, 24)


def test_without_the_package_there_is_text_and_no_function():
    form = mf.sliding_window(3).to_cute(8, 8)
    if importlib.util.find_spec("cutlass") is None:
        for call in (form.function, form.aux_scalars):
            with pytest.raises(mf.BackendError, match="nvidia-cutlass-dsl can't be imported"):
                call()


@pytest.mark.filterwarnings("ignore::UserWarning")  # CuTe's, of a function that reads no table and no number
def test_cute_itself_compiles_and_computes_the_masks():
    """On the CPU: CuTe's host functions need no GPU."""
    pytest.importorskip("cutlass")
    from tests.forms.cute_host import computed

    for name in PREDICATES:
        form, dense = form_of(name)
        assert torch.equal(computed(form, SHAPE), dense), name
