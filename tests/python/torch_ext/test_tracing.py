"""torch.compile, FakeTensor and TorchScript over the operators."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import vivace
import vivace.ops

OPS = torch.ops.vivace


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def sampling_arguments():
    def each(value):
        return torch.full((2,), value)

    rows = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    seen = torch.zeros(2, 11, dtype=torch.uint8)
    top_k = torch.zeros(2, dtype=torch.int32)
    return torch.randn(4, 11), rows, seen, each(0.5), each(0.8), each(1.2), each(0.05), each(0.9), top_k


def calls():
    """A call of each operator: (operator, arguments, keyword arguments)."""

    def random(*shape, grad=False):
        return torch.randn(*shape, requires_grad=grad)

    q, k, v = random(2, 5, 4, 16, grad=True), random(2, 9, 2, 16, grad=True), random(2, 9, 2, 16, grad=True)
    permuted = random(2, 4, 5, 16).transpose(1, 2)
    cache = {"k_cache": random(3, 16, 2, 16), "v_cache": random(3, 16, 2, 16)}
    new = {"k": random(2, 5, 2, 16), "v": random(2, 5, 2, 16), "cache_seqlens": int32(0, 3)}
    packed = random(10, 4, 16, grad=True), random(10, 2, 16, grad=True), random(10, 2, 16, grad=True)
    table = random(9, 4)
    sampling = sampling_arguments()
    return {
        "attention": (OPS.attention, (q, k, v), {"causal": True}),
        "attention_permuted": (OPS.attention, (permuted, k.detach(), v.detach()), {}),
        "attention_varlen": (OPS.attention_varlen, (*packed, int32(0, 3, 10), int32(0, 3, 10), 7, 7), {}),
        "attention_with_kvcache": (
            OPS.attention_with_kvcache,
            (q.detach(),),
            {**cache, **new, "causal": True, "probe": torch.zeros(2, 1, 16), "probe_head": 3},
        ),
        "rms_norm": (OPS.rms_norm, (random(3, 8, grad=True), random(8, grad=True)), {}),
        "add_rms_norm": (OPS.add_rms_norm, (random(3, 8), random(3, 8), random(8)), {}),
        "rotary_embedding": (OPS.rotary_embedding, (random(2, 5, 3, 8, grad=True), table, table), {}),
        "rotary_embedding_": (OPS.rotary_embedding_, (random(2, 5, 3, 8), table, table), {}),
        "silu_gate": (OPS.silu_gate, (random(3, 8, grad=True),), {}),
        "sample": (OPS.sample, (*sampling, torch.tensor([1, 2]), torch.tensor([0, 0])), {}),
        "sampling_probs": (OPS.sampling_probs, sampling, {}),
    }


CALLS = tuple(calls())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_every_operator_passes_opcheck(name):
    op, arguments, keywords = calls()[name]
    torch.library.opcheck(op, arguments, keywords)


@pytest.mark.parametrize("name", CALLS)
def test_fake_results_have_the_real_shapes_dtypes_and_strides(name):
    op, arguments, keywords = calls()[name]
    real = op(*arguments, **keywords)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def faked(value):
            return mode.from_tensor(value.detach()) if isinstance(value, torch.Tensor) else value

        fake = op(*map(faked, arguments), **{key: faked(value) for key, value in keywords.items()})
    if real is None:
        assert fake is None
        return
    for r, f in zip(*((x if isinstance(x, tuple | list) else (x,)) for x in (real, fake)), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


LENGTHS = (5, 9, 17, 33)


def attention_of_length(n):
    q, k, v = torch.randn(2, n, 4, 16), torch.randn(2, n, 2, 16), torch.randn(2, n, 2, 16)
    for t in (q, k, v):
        torch._dynamo.mark_dynamic(t, 1)
    return vivace.attention, (q, k, v), {"causal": True}


def varlen_of_length(n):
    q, k, v = torch.randn(2 * n, 4, 16), torch.randn(2 * n, 2, 16), torch.randn(2 * n, 2, 16)
    for t in (q, k, v):
        torch._dynamo.mark_dynamic(t, 0)
    lengths = int32(0, n, 2 * n)
    return vivace.attention_varlen, (q, k, v, lengths, lengths, max(LENGTHS), max(LENGTHS)), {}


def rms_norm_of_length(n):
    x = torch.randn(2, n, 8)
    torch._dynamo.mark_dynamic(x, 1)
    return vivace.rms_norm, (x, torch.randn(8)), {}


def silu_gate_of_length(n):
    x = torch.randn(2, n, 8)
    torch._dynamo.mark_dynamic(x, 1)
    return vivace.silu_gate, (x,), {}


def rotary_of_length(n):
    x, table = torch.randn(2, n, 3, 8), torch.randn(max(LENGTHS), 4)
    torch._dynamo.mark_dynamic(x, 1)
    return vivace.rotary_embedding, (x, table, table), {}


@pytest.mark.parametrize(
    "of_length", (attention_of_length, varlen_of_length, rms_norm_of_length, silu_gate_of_length, rotary_of_length)
)
def test_one_compilation_serves_every_length(of_length):
    torch._dynamo.reset()
    counter = CompileCounter()
    function = of_length(LENGTHS[0])[0]
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in LENGTHS:
        _, arguments, keywords = of_length(n)
        assert torch.equal(compiled(*arguments, **keywords), function(*arguments, **keywords))
    assert counter.frame_count == 1


def test_a_compiled_cache_step_writes_the_cache():
    torch._dynamo.reset()

    def step(q, k_cache, v_cache, k, v, lengths):
        return vivace.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    eager = torch.zeros(2, 8, 2, 16), torch.zeros(2, 8, 2, 16)
    traced = tuple(t.clone() for t in eager)
    expected = step(q, *eager, k, v, int32(0, 3))
    assert torch.equal(compiled(q, *traced, k, v, int32(0, 3)), expected)
    assert torch.equal(traced[0], eager[0]) and torch.equal(traced[1], eager[1])
    assert torch.equal(traced[0][1, 3], k[1, 0])


def test_compiled_gradients_are_the_eager_ones():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: vivace.rms_norm(x, w).square().sum(), fullgraph=True, backend="aot_eager")
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    expected = torch.autograd.grad(vivace.rms_norm(x, w).square().sum(), (x, w))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, w), (x, w)), expected)


class EveryOperator(torch.nn.Module):
    """Calls them all with as few arguments as their schemas allow."""

    def forward(self, q, k, v, k_cache, v_cache, lengths, cu_seqlens, x, table, logits, rows, seen, one, top_k, seed):
        a = torch.ops.vivace.attention(q, k, v)[0]
        b = torch.ops.vivace.attention_varlen(q[0], k[0], v[0], cu_seqlens, cu_seqlens, 5, 5)[0]
        c = torch.ops.vivace.attention_with_kvcache(q, k_cache, v_cache, k, v, lengths, causal=True)[0]
        n = torch.ops.vivace.rms_norm(x, x[0])
        n = n + torch.ops.vivace.add_rms_norm(n, x.clone(), x[0])
        r = torch.ops.vivace.rotary_embedding(q, table, table)
        torch.ops.vivace.rotary_embedding_(r, table, table)
        s = torch.ops.vivace.silu_gate(x)
        t = torch.ops.vivace.sample(logits, rows, seen, one, one, one, one, one, top_k, seed, seed)
        p = torch.ops.vivace.sampling_probs(logits, rows, seen, one, one, one, one, one, top_k)
        g = torch.ops.vivace.force_arch(0)
        return [a, b, c, n, r, s, t.float(), p, torch.tensor(g)], torch.ops.vivace.build_info()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_calls_every_operator_and_survives_a_file(tmp_path):
    def arguments():
        torch.manual_seed(3)
        q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
        cache = torch.zeros(1, 8, 2, 8), torch.zeros(1, 8, 2, 8)
        rows, seen = torch.tensor([[0, -1]], dtype=torch.int32), torch.zeros(1, 11, dtype=torch.uint8)
        top_k, seed = torch.zeros(1, dtype=torch.int32), torch.tensor([5])
        x, table = torch.randn(3, 8), torch.randn(9, 4)
        return (
            q,
            k,
            v,
            *cache,
            int32(0),
            int32(0, 5),
            x,
            table,
            torch.randn(1, 11),
            rows,
            seen,
            torch.ones(1),
            top_k,
            seed,
        )

    path = str(tmp_path / "every.pt")
    torch.jit.save(torch.jit.script(EveryOperator()), path)
    expected, expected_info = EveryOperator()(*arguments())
    results, info = torch.jit.load(path)(*arguments())
    assert info == expected_info
    for result, reference in zip(results, expected, strict=True):
        assert torch.equal(result, reference)
