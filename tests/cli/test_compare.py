"""`maskflash compare`: the exit status says whether masks differ, and the text where."""

import io
import json

import pytest

from maskflash import cli


def compared(capsys, *arguments):
    status = cli.main(["compare", *arguments])
    return status, capsys.readouterr()


@pytest.mark.parametrize(
    ("a", "b", "lengths", "says"),
    [
        ("transformers(sliding_window=128)", "flash_attn(causal=True, window_size=(127, 0))", (), "the same pairs"),
        ("transformers(sliding_window=128)", "vllm(sliding_window=128)", (), "the same pairs"),
        ("flash_attn(causal=True)", "sdpa(is_causal=True)", ("--q-len", "9"), "the same pairs"),
        ('xformers(attn_bias="LowerTriangularMask")', "jax(is_causal=True)", ("--q-len=4", "--kv-len=9"), "same pairs"),
        ("transformers(attention_chunk_size=100)", "chunked(100)", (), "the same pairs"),
        ("transformers", "causal", (), "the same pairs"),
    ],
)
def test_the_same_is_0(a, b, lengths, says, capsys):
    status, said = compared(capsys, a, b, *lengths)
    assert (status, said.err) == (0, "")
    assert says in said.out


def test_a_difference_is_1(capsys):
    status, said = compared(capsys, "flash_attn(causal=True, window_size=(128, 0))", "transformers(sliding_window=128)")
    assert status == 1
    assert "4,096 queries x 4,096 keys: a shows what b shows, and more" in said.out
    assert "only in a: 3,968 pairs, first query 128, key 0" in said.out
    assert "      128 a ■ ■ ■ ■" in said.out


def test_json_has_the_facts(capsys):
    status, said = compared(
        capsys, "sdpa(is_causal=True)", "flash_attn(causal=True)", "--q-len=4", "--kv-len=8", "--json"
    )
    found = json.loads(said.out)
    assert status == 1
    assert (found["equivalent"], found["only_a"]) == (False, None)
    assert found["only_b"] == {"pairs": 16, "first": [0, 0, 0, 1]}


def test_lengths_reach_beyond_what_the_masks_name(capsys):
    """Windows of 8,192 and 8,193 are the same at 4,096 tokens."""
    _, said = compared(capsys, "sliding_window(8192)", "transformers(sliding_window=8192)")
    assert "16,384 queries x 16,384 keys: a shows what b shows, and more" in said.out
    _, said = compared(capsys, "causal & document(300, 200)", "causal")
    assert "500 queries x 500 keys: b shows what a shows, and more" in said.out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "flash_attn(window=(128, 0))",
            "unexpected argument 'window' of flash_attn; its mask is in causal, window_size",
        ),
        ("transformers(128)", "transformers takes sliding_window, attention_chunk_size, is_causal, each by name"),
        ("flash_attn_varlen(causal=True)", "flash_attn_varlen needs cu_seqlens_q, cu_seqlens_k"),
        ("transformer(sliding_window=128)", "there is no preset 'transformer'; did you mean transformers?"),
    ],
)
def test_what_means_nothing_is_2(text, says, capsys):
    status, said = compared(capsys, text, "causal")
    assert status == 2
    assert says in said.err


def test_two_masks_are_needed(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "causal"])
    assert stop.value.code == 2


def test_an_output_of_ascii_gets_ascii(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert cli.main(["compare", "sliding_window(1)", "causal", "--q-len", "3"]) == 1
    out.flush()
    assert b"      2 b # #" in out.buffer.getvalue()


def test_packed_sequences_say_their_tokens(capsys):
    packed = "flash_attn_varlen(cu_seqlens_q=[0, 300, 800], cu_seqlens_k=[0, 300, 800], causal=True)"
    status, said = compared(capsys, packed, "causal & document(300, 500)")
    assert status == 0
    assert "800 queries x 800 keys" in said.out
