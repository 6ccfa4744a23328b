"""torch's registry: scaled_dot_product_attention on our kernel, and torch's own back again."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention as registry

import vivace.ops

pytestmark = pytest.mark.skipif(
    not hasattr(registry, "restore_flash_attention_impl"), reason="torch before 2.11 has no registry"
)
OPERATORS = (
    "_scaled_dot_product_flash_attention",
    "_flash_attention_forward",
    "_scaled_dot_product_flash_attention_backward",
    "_flash_attention_backward",
)


def dispatch_tables():
    return {name: torch._C._dispatch_dump(f"aten::{name}") for name in OPERATORS}


@pytest.fixture
def active():
    registry.activate_flash_attention_impl("vivace")
    yield
    if registry.current_flash_attention_impl() is not None:
        registry.restore_flash_attention_impl()


def test_the_name_is_registered_and_nothing_is_active():
    assert "vivace" in registry.list_flash_attention_impls()
    assert registry.current_flash_attention_impl() is None


def test_activation_overrides_the_forward_and_torchs_call_restores_it():
    before = dispatch_tables()
    registry.activate_flash_attention_impl("vivace")
    assert registry.current_flash_attention_impl() == "vivace"
    during = dispatch_tables()
    assert {n for n in OPERATORS if during[n] != before[n]} == set(OPERATORS[:2])
    registry.activate_flash_attention_impl("vivace")  # again: the first is removed before
    registry.restore_flash_attention_impl()
    assert dispatch_tables() == before and registry.current_flash_attention_impl() is None


def heads(seqlen_q=129, seqlen_k=129, heads_kv=4, head_dim=64, dtype=torch.bfloat16, device="cuda"):
    shapes = (2, seqlen_q, 4, head_dim), (2, seqlen_k, heads_kv, head_dim), (2, seqlen_k, heads_kv, head_dim)
    return tuple(torch.randn(s, device=device, dtype=dtype).transpose(1, 2).detach().requires_grad_() for s in shapes)


def run(q, k, v, **options):
    with registry.sdpa_kernel(registry.SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["full", "causal", "grouped", "cross", "narrow", "scale", "contiguous"])
def test_scaled_dot_product_attention_runs_our_kernel(case):
    shapes = {"grouped": {"heads_kv": 2}, "cross": {"seqlen_k": 77}, "narrow": {"head_dim": 40}}.get(case, {})
    options = {"causal": {"is_causal": True}, "grouped": {"enable_gqa": True}, "scale": {"scale": 0.2}}.get(case, {})
    q, k, v = heads(**shapes)
    if case == "contiguous":
        q, k, v = (t.detach().contiguous().requires_grad_() for t in (q, k, v))
    dout = torch.randn_like(q)
    theirs = run(q, k, v, **options)
    their_grads = torch.autograd.grad(theirs, (q, k, v), dout)
    exact = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), **options)
    exact_grads = torch.autograd.grad(exact, (q, k, v), dout.double())
    registry.activate_flash_attention_impl("vivace")
    try:
        vivace.attention(
            *(t.detach()[:, :, :8].transpose(1, 2).float() for t in (q, k, v))
        )  # another kernel, to see a change
        other = vivace.attention_kernel()
        ours = run(q, k, v, **options)
        assert vivace.attention_kernel() != other
        assert ours.stride() == theirs.stride()
        grads = torch.autograd.grad(ours, (q, k, v), dout)
    finally:
        registry.restore_flash_attention_impl()
    for got, other, truth in zip((ours, *grads), (theirs, *their_grads), (exact, *exact_grads), strict=True):
        error, allowed = ((t.double() - truth).abs().max() for t in (got, other))
        assert error <= 2 * allowed + 1e-3


@pytest.mark.gpu
def test_dropout_stays_with_torch_and_repeats_with_its_seed(active):
    q, k, v = heads()
    torch.manual_seed(3)
    ours = run(q, k, v, dropout_p=0.2)
    registry.restore_flash_attention_impl()
    torch.manual_seed(3)
    assert torch.equal(ours, run(q, k, v, dropout_p=0.2))


@pytest.mark.gpu
def test_the_packed_operator_and_its_backward(active):
    cu = torch.tensor([0, 30, 30, 101], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(101, 4, 64, device="cuda", dtype=torch.float16).requires_grad_() for _ in range(3))

    def packed(causal, window):
        options = {"window_size_left": window, "window_size_right": 0 if window is not None else None}
        return torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, 71, 71, 0.0, causal, False, **options)[:2]

    dout = torch.randn(101, 4, 64, device="cuda", dtype=torch.float16)
    for causal, window in ((False, None), (True, None), (True, 9)):
        registry.activate_flash_attention_impl("vivace")
        out, lse = packed(causal, window)
        grads = torch.autograd.grad(out, (q, k, v), dout)
        registry.restore_flash_attention_impl()
        expected, expected_lse = packed(causal, window)
        expected_grads = torch.autograd.grad(expected, (q, k, v), dout)
        torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)
        for got, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-2, atol=4e-3)


@pytest.mark.gpu
def test_exported_and_compiled_programs_use_it(active):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return (
                F.scaled_dot_product_attention(q, k, v, is_causal=True)
                .transpose(1, 2)
                .reshape(q.shape[0], q.shape[2], -1)
            )

    q, k, v = (t.detach() for t in heads())
    registry.restore_flash_attention_impl()
    expected = Attention()(q, k, v)
    exported = torch.export.export(Attention(), (q, k, v)).module()
    compiled = torch.compile(Attention(), backend="aot_eager")
    registry.activate_flash_attention_impl("vivace")
    with registry.sdpa_kernel(registry.SDPBackend.FLASH_ATTENTION):
        for program in (exported, compiled):
            vivace.attention(*(t[:, :, :8].transpose(1, 2).float() for t in (q, k, v)))
            other = vivace.attention_kernel()
            torch.testing.assert_close(program(q, k, v), expected, rtol=2e-2, atol=2e-2)
            assert vivace.attention_kernel() != other
