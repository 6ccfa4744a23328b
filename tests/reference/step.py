"""A token step of a Llama decoder, row by row and layer by layer."""

import torch


def _norm(x, weight, eps, compute):
    if compute == torch.float64:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()
    wide = x.float()  # as transformers: the norm in float32, the weight in the model's dtype
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(compute) * weight.to(compute)


def _rotate(x, cos, sin, compute):
    """x (heads, head_dim) by the angles of one position (head_dim / 2)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos.to(compute), sin.to(compute)
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


def decode_step(
    w, tokens, positions, row_request, k_cache, v_cache, seqlens, cache_rows, eps=1e-5, *, compute=torch.float64
):
    """One token of each row; the caches (layers, cache_rows, capacity, heads_kv, head_dim) are left as they are.

    w: the stacked weights by the names of vivace.ops.decode_step, rotary tables included. compute: float64, or the
    dtype of an eager run, which rounds after every operation.

    Returns:
        logits (rows, vocab), keys and values that the step appends (layers, rows, heads_kv, head_dim), and the
        attention probabilities as a list over layers of lists over rows of (heads, keys); all of compute's dtype.
    """
    layers, heads_kv, head_dim = k_cache.shape[0], k_cache.shape[3], k_cache.shape[4]
    heads = w["out"].shape[2] // head_dim
    group, scale = heads // heads_kv, head_dim**-0.5

    def linear(x, weight):
        return x @ weight.to(compute).T

    logits, new_keys, new_values = [], [], []
    attention = [[] for _ in range(layers)]
    for row, request in enumerate(row_request.tolist()):
        length, cache_row = int(seqlens[row]), int(cache_rows[row])
        # The sum of the embeddings is rounded to the weights' dtype by every implementation.
        x = w["speech_emb"][tokens[request]] + w["speech_pos_emb"][positions[request]]
        x = x.to(compute)
        keys, values = [], []
        for layer in range(layers):
            h = _norm(x, w["input_norm"][layer], eps, compute)
            q, k, v = linear(h, w["qkv"][layer]).split(
                [heads * head_dim, heads_kv * head_dim, heads_kv * head_dim], dim=-1
            )
            cos, sin = w["rotary_cos"][length], w["rotary_sin"][length]
            q = _rotate(q.view(heads, head_dim), cos, sin, compute)
            k = _rotate(k.view(heads_kv, head_dim), cos, sin, compute)
            v = v.view(heads_kv, head_dim)
            keys.append(k)
            values.append(v)
            all_k = torch.cat([k_cache[layer, cache_row, :length].to(compute), k[None]])  # (keys, heads_kv, head_dim)
            all_v = torch.cat([v_cache[layer, cache_row, :length].to(compute), v[None]])
            all_k = all_k.repeat_interleave(group, dim=1)
            all_v = all_v.repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,nhd->hn", q, all_k) * scale
            wide = scores if compute == torch.float64 else scores.float()
            p = torch.softmax(wide, dim=-1).to(compute)
            attention[layer].append(p)
            x = x + linear(torch.einsum("hn,nhd->hd", p, all_v).reshape(-1), w["out"][layer])
            h = _norm(x, w["post_norm"][layer], eps, compute)
            gate, up = linear(h, w["gate_up"][layer]).chunk(2, dim=-1)
            x = x + linear(torch.nn.functional.silu(gate) * up, w["down"][layer])
        logits.append(linear(_norm(x, w["norm"], eps, compute), w["head"]))
        new_keys.append(torch.stack(keys))
        new_values.append(torch.stack(values))
    return torch.stack(logits), torch.stack(new_keys, 1), torch.stack(new_values, 1), attention
