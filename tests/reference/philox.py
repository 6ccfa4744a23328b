"""Philox4x32-10 from its definition (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)."""

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
WORD = np.uint64(0xFFFFFFFF)


def philox4x32_10(counter, key):
    """Ten rounds on a counter of four words and a key of two.

    counter: four uint32-valued arrays of one shape, least significant first; key: two ints. Returns four uint64 arrays
    that hold 32-bit words.
    """
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = list(key)
    for _ in range(10):
        product0 = np.uint64(MULTIPLIERS[0]) * c[0]
        product1 = np.uint64(MULTIPLIERS[1]) * c[2]
        high0, low0 = product0 >> np.uint64(32), product0 & WORD
        high1, low1 = product1 >> np.uint64(32), product1 & WORD
        c = [high1 ^ c[1] ^ np.uint64(k[0]), low1, high0 ^ c[3] ^ np.uint64(k[1]), low0]
        k = [(word + step) & 0xFFFFFFFF for word, step in zip(k, KEY_INCREMENTS, strict=True)]
    return c


def split(value):
    """A 64-bit integer (of either sign) as two 32-bit words, least significant first."""
    value = int(value) & 0xFFFFFFFFFFFFFFFF
    return value & 0xFFFFFFFF, value >> 32


def sampling_uniforms(seed, step, vocab):
    """(vocab,) float64 in (0, 1]: entry i is word i % 4 of counter (i // 4, step), 24 bits of it, plus one."""
    block = np.arange((vocab + 3) // 4, dtype=np.uint64)
    step_low, step_high = split(step)
    zero = np.zeros_like(block)
    words = philox4x32_10(
        (block & WORD, block >> np.uint64(32), zero + np.uint64(step_low), zero + np.uint64(step_high)), split(seed)
    )
    bits = np.stack(words, axis=1).reshape(-1)[:vocab]
    return ((bits >> np.uint64(8)) + np.uint64(1)).astype(np.float64) / 2.0**24


def dropout_keep(seed, offset, head_rows, seqlen_q, seqlen_k, p):
    """(len(head_rows), seqlen_q, seqlen_k) bool: which probabilities survive dropout with probability p.

    head_rows are batch index * heads + head. Column j is byte j % 4 of word (j % 16) // 4 of the draw whose counter is
    (j // 16, i, offset + (head_row << 32)); it is kept iff it is at most floor((1 - p) * 255).
    """
    columns = np.arange((seqlen_k + 15) // 16, dtype=np.uint64)[None, :]
    rows = np.arange(seqlen_q, dtype=np.uint64)[:, None]
    column_word, row_word = np.broadcast_arrays(columns, rows)
    threshold = int(np.floor((1.0 - p) * 255.0))
    keep = np.empty((len(head_rows), seqlen_q, seqlen_k), dtype=bool)
    for n, head_row in enumerate(head_rows):
        low, high = split(int(offset) + (int(head_row) << 32))
        ones = np.ones_like(column_word)
        words = philox4x32_10((column_word, row_word, ones * np.uint64(low), ones * np.uint64(high)), split(seed))
        bytes_ = [(word >> np.uint64(8 * b)) & np.uint64(0xFF) for word in words for b in range(4)]
        draws = np.stack(bytes_, axis=-1).reshape(seqlen_q, 16 * columns.shape[1])[:, :seqlen_k]
        keep[n] = draws <= threshold
    return keep
