"""Runs every CUDA kernel once on tiny shapes, for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 tests/python/ops/sanitize.py

Without torch's caching every tensor is an allocation of its own: an access past its end is seen. --brief: each kernel,
fewer shapes, for the tools that slow a kernel down a hundredfold (racecheck, initcheck, synccheck). --whole-rows, for
initcheck: decode attention does not split rows. The packets in which parts meet lie in memory that nobody has cleared;
one counts once it carries the launch's 64-bit number, so what was there before need not be anything.

Known false positives, left out by .ci/gpu_round.py:
- synccheck, "Missing wait" in the step's persistent_kernel: the consumers' last arrivals tell that stages of the ring
  are free, and no load follows that would wait for them.
- synccheck, "Divergent thread(s) in block" in the mma.sync forward of head_dim 96 and 128: warps whose rows see nothing
  of a tile go around its arithmetic and meet the others at the same barrier from another place in the code, whole warps
  and as often as the others. That is what PTX's bar.sync counts; the tool wants one place. Left out by --one-place.
- racecheck, the step's split_kernel: cp.async.bulk writes a stage of keys that ldmatrix has read. Between the two one
  lane of each warp arrives, behind __syncwarp, at the barrier that the loading thread waits for; racecheck follows
  arrivals thread by thread. (What its courier and its warps tell each other was reported likewise until all lanes
  arrived, which costs nothing there.) Left out by --every-lane. It counts bytes: with 5 rows of up to 600 keys
  there are millions, and recording them takes the kernel seconds.
"""

import itertools
import sys

import torch

import vivace.ops  # noqa: F401

OPS = torch.ops.vivace
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
WHOLE_ROWS = "--whole-rows" in sys.argv
ONE_PLACE = "--one-place" in sys.argv  # without kernels whose warps meet at a barrier from two places in the code
EVERY_LANE = "--every-lane" in sys.argv  # without kernels of which one lane arrives for what others have read


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def unaligned(x):
    """The same values, no row 16-byte aligned."""
    room = torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    room[..., 1:] = x
    return room[..., 1:]


def dense(dtype, dim):
    q, k, v = randn(2, 37, 4, dim, dtype=dtype), randn(2, 71, 2, dim, dtype=dtype), randn(2, 71, 2, dim, dtype=dtype)
    OPS.attention(q, k, v, causal=True)
    OPS.attention(q, k, v)
    OPS.attention(*map(unaligned, (q, k, v)), window_left=5, window_right=3)
    many = randn(1, 200, 1, dim, dtype=dtype)  # blocks of keys: every buffer is used again
    OPS.attention(many[:, :70], many, many)
    OPS.attention(many[:, :70], many, many, causal=True)
    v[0, 60, 1, 3] = float("nan")  # the sm90 kernel does such a tile twice
    OPS.attention(q, k, v, causal=True)


def dense_rich(dtype, dim):
    q, k, v = randn(1, 19, 2, dim, dtype=dtype), randn(1, 35, 2, dim, dtype=dtype), randn(1, 35, 2, dim, dtype=dtype)
    rich = {"alibi_slopes": torch.rand(2, device="cuda"), "sinks": torch.randn(2, device="cuda"), "softcap": 10.0}
    OPS.attention(q, k, v, bias=torch.randn(1, 2, 19, 35, device="cuda"), **rich)
    OPS.attention(q, k, v, bias=torch.rand(1, 1, 1, 35, device="cuda") < 0.5)
    OPS.attention(q, k, v, causal=True, dropout_p=0.2, rng_state=torch.tensor([1, 2], device="cuda"))


def varlen(dtype, dim):
    q, k, v = randn(24, 4, dim, dtype=dtype), randn(60, 2, dim, dtype=dtype), randn(60, 2, dim, dtype=dtype)
    OPS.attention_varlen(q, k, v, int32(0, 5, 5, 24), int32(0, 20, 27, 60), 19, 33, causal=True)
    pages = [randn(9, 7, 2, dim, dtype=dtype) for _ in range(2)]
    table = torch.randperm(9, device="cuda")[:8].int().view(2, 4)
    OPS.attention_varlen(q, *pages, int32(0, 4, 24), int32(0, 20, 47), 20, 27, block_table=table, causal=True)


def kvcache(dtype, dim):
    angle = torch.rand(40, dim // 2, device="cuda")
    rotary = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "rotary_interleaved": False}
    splits = (1,) if WHOLE_ROWS else (1, 3)
    for seqlen_q, num_splits in itertools.product((1, 21), splits):
        q, k, v = (randn(2, seqlen_q, h, dim, dtype=dtype) for h in (4, 2, 2))
        common = {"k": k, "v": v, "causal": True, "num_splits": num_splits, **rotary}
        caches = [randn(3, 40, 2, dim, dtype=dtype) for _ in range(2)]
        probe = {"probe": torch.zeros(2, 1, 40, device="cuda"), "probe_head": 3}
        OPS.attention_with_kvcache(
            q, *caches, cache_seqlens=int32(0, 19), cache_batch_idx=int32(2, 0), **common, **probe
        )
        # past the capacity: row 1 has 39 keys and gets one that fits, or 21 that mostly do not
        OPS.attention_with_kvcache(q, *caches, cache_seqlens=int32(3, 39), **common)
        pages = [randn(12, 8, 2, dim, dtype=dtype) for _ in range(2)]
        table = torch.randperm(12, device="cuda")[:10].int().view(2, 5)
        OPS.attention_with_kvcache(q, *pages, cache_seqlens=int32(7, 19), block_table=table, **common)
    q, k, v = (randn(9, h, dim, dtype=dtype) for h in (4, 2, 2))
    caches = [randn(3, 40, 2, dim, dtype=dtype) for _ in range(2)]
    options = {
        "cu_seqlens_q": int32(0, 1, 8, 9),
        "max_seqlen_q": 7,
        "causal": True,
        "num_splits": int(WHOLE_ROWS),
        **rotary,
    }
    OPS.attention_with_kvcache(q, *caches, k, v, int32(39, 0, 12), **options)
    # every query sees every key: narrow and wide, rows and pages, parts that meet and parts without keys
    for heads, seqlen_q, num_splits in itertools.product((4, 8), (1, 2), splits):
        q = randn(3, seqlen_q, heads, dim, dtype=dtype)
        lengths = int32(400, 0, 33)
        caches = [randn(3, 400, 2, dim, dtype=dtype) for _ in range(2)]
        probe = {"probe": torch.zeros(3, 1, 400, device="cuda"), "probe_head": 3}
        OPS.attention_with_kvcache(q, *caches, cache_seqlens=lengths, num_splits=num_splits, **probe)
        pages = [randn(24, 64, 2, dim, dtype=dtype) for _ in range(2)]
        table = torch.randperm(24, device="cuda")[:21].int().view(3, 7)
        OPS.attention_with_kvcache(q, *pages, cache_seqlens=lengths, block_table=table, num_splits=num_splits)
        new = [randn(3, 2, 2, dim, dtype=dtype) for _ in range(2)]  # one row has no room, one room for one
        OPS.attention_with_kvcache(q, *caches, *new, int32(400, 0, 399), num_splits=num_splits)
        OPS.attention_with_kvcache(q, *pages, *new, int32(63, 0, 447), block_table=table, num_splits=num_splits)


def others(dtype):
    x, weight = randn(5, 70, dtype=dtype), randn(70, dtype=dtype)
    OPS.rms_norm(x, weight)
    OPS.rms_norm(randn(2, 4096, dtype=dtype), randn(4096, dtype=dtype))
    OPS.add_rms_norm(x, randn(5, 70, dtype=dtype), weight)
    OPS.silu_gate(x)
    OPS.silu_gate(randn(3, 4096, dtype=dtype))
    angle = torch.rand(9, 16, device="cuda")
    for interleaved in (False, True):
        OPS.rotary_embedding(
            randn(5, 3, 40, dtype=dtype), angle.cos(), angle.sin(), int32(0, 8, 3, 3, 100), interleaved
        )
        OPS.rotary_embedding_(randn(2, 4, 3, 32, dtype=dtype), angle.cos(), angle.sin(), None, interleaved)
    for vocab in (7, 1000, 8194):
        arguments = (
            randn(3, vocab, dtype=dtype),
            int32(0, 1, 2, -1).view(2, 2),
            torch.zeros(2, vocab, dtype=torch.uint8, device="cuda"),
            *(torch.full((2,), value, device="cuda") for value in (0.5, 0.8, 1.2, 0.05, 0.9)),
            int32(0, 20),
        )
        OPS.sampling_probs(*arguments)
        OPS.sample(*arguments, torch.tensor([1, 2], device="cuda"), torch.tensor([0, 9], device="cuda"))
        for top_p, top_k in ((0.9, (0, 20)), (1.0, (0, 0))):  # filters; a race alone
            whole = torch.zeros(7, 2, dtype=torch.int64, device="cuda")
            OPS.sample_advance(
                *arguments[:7],
                torch.full((2,), top_p, device="cuda"),
                int32(*top_k),
                *whole[:4],  # seed, step, tokens, positions
                int32(3, 4, 5),
                whole[4],
                100,
                torch.zeros(2, 2, dtype=torch.int64).pin_memory(),
                whole[5],
            )


def token_step():
    """Each family of decode_step that takes the shape: a few rows, a padding and a full one, also with probes."""
    layers, hidden, heads, dim, inner, vocab, capacity = 2, 1024, 16, 64, 4096, 8194, 600
    sizes = [(vocab, hidden), (24, hidden), (layers, hidden), (layers, 3 * hidden, hidden), (layers, hidden, hidden)]
    sizes += [(layers, hidden), (layers, 2 * inner, hidden), (layers, hidden, inner), (hidden,), (vocab, hidden)]
    weights = [randn(*size) for size in sizes]
    k, v = (randn(layers, 24, heads, capacity, dim).transpose(2, 3) for _ in range(2))
    angle = torch.rand(capacity, dim // 2, device="cuda")
    rows = {2: ((0, 66), (2, 0)), 5: ((0, 590, 1, capacity, 30), (2, 0, -1, 1, 3))}
    many = {24: (range(20, 140, 5), range(24))}  # enough for the split kernel to deal what is left over
    ran = 0
    for family in (1, 2, 4) if EVERY_LANE else (1, 2, 3, 4):
        for count, (lengths, cache_rows) in (rows | many if family == 3 else rows).items():
            size = OPS.decode_step_workspace(weights[3], weights[7], weights[9], k, count, False, family)
            if size < 0:
                continue
            whole = torch.arange(count, device="cuda")
            workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
            state = (int32(*lengths), int32(*cache_rows), workspace)
            probes = {
                "probes": torch.zeros(3, count, 1, capacity, device="cuda"),
                "probe_layers": [1, 0, 1],
                "probe_heads": [5, 7, 5],
            }
            for extra in ({}, probes):
                tables = angle.cos(), angle.sin()
                OPS.decode_step(whole, whole, whole, *weights, *tables, k, v, *state, **extra, family=family)
            ran += 1
    return ran


def main():
    brief = "--brief" in sys.argv
    calls = 0
    for family, dtype in ((0, torch.bfloat16), (0, torch.float32), (80, torch.float16), (-1, torch.bfloat16)):
        OPS.force_arch(family)
        tensor_cores = family >= 0 and dtype in SIXTEEN_BIT
        dims = (64, 128, 192) if brief else (64, 40, 96, 128, 192, 256) if tensor_cores else (64, 40)
        for dim in dims:
            if ONE_PLACE and family == 80 and dim in (96, 128):
                continue
            for attend in (dense, dense_rich, varlen, kvcache):
                if brief and (dim != 64 if attend is dense_rich else dim == 192 and attend is not dense):
                    continue
                attend(dtype, dim)
                torch.cuda.synchronize()
                calls += 1
    OPS.force_arch(0)
    for dtype in (torch.float32, torch.bfloat16):
        others(dtype)
        torch.cuda.synchronize()
        calls += 1
    calls += token_step()
    torch.cuda.synchronize()
    print(f"{calls} groups of calls ran")


if __name__ == "__main__":
    main()
