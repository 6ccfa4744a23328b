"""Peers compute what vivace computes: the same mask, the same sequences."""

import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend

import vivace.ops
from vivace.bench import peers, run, subject, tensors
from vivace.bench.cells import Cell


def outputs(cell, peer):
    inputs = tensors.make_inputs(cell, "cpu", 3)
    ours = subject.own_call(cell, inputs, "auto")()[0]
    return ours, {name: way.unpack(peers.first(way.call())) for name, way in peer(cell, inputs).items()}


def forward(**fields):
    return Cell(
        "forward", **({"d": 16, "s": 12, "s_k": 12, "batch": 2, "heads": 4, "heads_kv": 4, "dtype": "fp32"} | fields)
    )


CELLS = [
    forward(),
    forward(causal=True),
    forward(causal=True, s=5, s_k=12),
    forward(causal=True, window=3),
    forward(window=2, s=7),
    forward(causal=True, heads=4, heads_kv=2),
    Cell("varlen", d=16, causal=True, batch=3, heads=2, heads_kv=2, lengths="3x2-9", dtype="fp32"),
    Cell("decode", d=16, heads=4, heads_kv=2, rows=3, kv=10, dtype="fp32"),
    Cell("decode", d=16, heads=4, heads_kv=2, rows=3, kv=32, page=16, dtype="fp32"),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.title())
def test_torchs_sdpa_gives_vivaces_output_in_every_layout(cell):
    ours, theirs = outputs(cell, lambda *args: peers.torch_ways(None, *args))
    assert theirs.keys() == ({"padded"} if cell.op == "varlen" else {"bshd", "bhsd"})
    for out in theirs.values():
        assert tensors.difference(ours, out) < 1e-5


def test_torchs_flash_backend_is_not_asked_for_windows():
    with pytest.raises(peers.Unsupported, match="no window"):
        peers.mask_options(SDPBackend.FLASH_ATTENTION, forward(window=3), None)


def fake_package(everything):
    """A module with flash-attn's functions, on the reference of vivace itself."""
    ops = torch.ops.vivace

    def sides(window_size):
        assert all(side == everything or side >= 0 for side in window_size)
        return [-1 if side is None else side for side in window_size]

    def flash_attn_func(q, k, v, causal=False, window_size=(everything, everything)):
        left, right = sides(window_size)
        return ops.attention(q, k, v, causal=causal, window_left=left, window_right=right)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        return ops.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal)[0]

    def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=None):
        return ops.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=cache_seqlens)[0]

    functions = (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)
    return types.SimpleNamespace(**{function.__name__: function for function in functions})


@pytest.mark.parametrize("name", ["flash_attn", "fa3", "fa4"])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.title())
def test_flash_attn_is_called_as_its_versions_want(name, cell):
    module = fake_package(None if name == "fa4" else -1)
    if name == "fa4":
        del module.flash_attn_with_kvcache
    ours, theirs = outputs(cell, peers.package_peer(name, module))
    assert len(theirs) == 1
    for out in theirs.values():
        assert tensors.difference(ours, out) < 1e-5


def test_packages_that_are_installed_are_found(monkeypatch):
    module = types.ModuleType("flash_attn_interface")
    vars(module).update(vars(fake_package(-1)))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    found, missing = peers.installed("cuda", ["cudnn", "fa3", "fa4"])
    assert found.keys() == {"cudnn", "fa3"}
    assert "No module named 'flash_attn" in missing["fa4"]
    assert peers.installed("cpu", None)[0].keys() == {"sdpa"}
    assert peers.installed("cpu", ["none"]) == ({}, {})
    assert peers.installed("cpu", ["cudnn"]) == ({}, {"cudnn": "not for cpu"})


def test_the_hash_follows_the_elements_not_the_strides():
    x = torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4)
    assert tensors.hash_of(x) == tensors.hash_of(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert tensors.hash_of(x) != tensors.hash_of(x + 1)
    assert len(tensors.hash_of(x[:0])) == 12


def test_inputs_follow_from_the_seed_alone():
    cell = CELLS[6]
    one, again, other = (tensors.make_inputs(cell, "cpu", seed) for seed in (1, 1, 2))
    assert torch.equal(one.q, again.q) and one.lengths == again.lengths
    assert one.q.shape != other.q.shape or not torch.equal(one.q, other.q)
    assert one.q.shape[0] == sum(one.lengths) == one.cu_seqlens[-1]
    assert max(one.lengths) == 9 and min(one.lengths) >= 2


def test_the_family_is_the_one_that_the_last_call_ran_on():
    assert subject.family_of("attention_forward_sm80") == "sm80"
    assert subject.family_of("attention_forward_sm90") == "sm90a"
    assert subject.family_of("attention_forward_generic") == "generic"
    x = torch.zeros(1, 2, 1, 8)
    torch.ops.vivace.attention(x, x, x)
    assert subject.family_of(vivace.ops.attention_kernel()) == "cpu"


def test_a_gpu_that_is_not_there_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.choose_device("auto", "attention") == "cpu"
    with pytest.raises(ValueError, match="--device cuda: torch sees no CUDA device"):
        run.choose_device("cuda", "attention")
