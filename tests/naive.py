"""Loop oracles: the slowest, plainest statement of what the library computes. Imports nothing of the library.

One number at a time, no vectorisation, no shared code: an oracle that shared code could share its mistakes.
Numbers of the formats (scales, thresholds, products) are float32 at each step, as the formats define; sums
are exact (math.fsum).
"""

from __future__ import annotations

import math
import struct

import numpy as np

# ---- packing: the codes of 2, 3, 4 or 8 bits as one string of binary digits


def packed_size(count, bits):
    codes_per_unit, bytes_per_unit = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}[bits]
    return math.ceil(count / codes_per_unit) * bytes_per_unit


def pack(codes, bits):
    digits = "".join(format(int(c), f"0{bits}b") for c in codes)
    digits = digits.ljust(8 * packed_size(len(codes), bits), "0")
    return [int(digits[i : i + 8], 2) for i in range(0, len(digits), 8)]


def unpack(packed, bits, count):
    digits = "".join(format(int(b), "08b") for b in packed)
    return [int(digits[bits * i : bits * (i + 1)], 2) for i in range(count)]


# ---- codebooks


def normal_quantile(p):
    """x with Φ(x) = p, by bisection on the error function."""
    low, high = -10.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        if 0.5 * math.erfc(-middle / math.sqrt(2)) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def normal_float(bits):
    """QLoRA's NF-k as bitsandbytes' create_normal_map computes it."""
    offset = 1 - 0.5 * (1 / (2 * 2**bits) + 1 / (2 * (2**bits - 1)))
    values = [0.0]
    for sign, count in ((1, 2 ** (bits - 1)), (-1, 2 ** (bits - 1) - 1)):
        for i in range(count):
            values.append(sign * normal_quantile(offset + (0.5 - offset) * i / count))
    return sorted(v / max(values) for v in values)


def dynamic_map():
    values = [0.0, 1.0]
    for i in range(7):
        edges = [0.1 + 0.9 * j / 2**i for j in range(2**i + 1)]
        for j in range(2**i):
            middle = (edges[j] + edges[j + 1]) / 2 * 10.0 ** (i - 6)
            values += [middle, -middle]
    return sorted(values)


def blocks(count, block_size):
    return [range(start, min(start + block_size, count)) for start in range(0, count, block_size)]


def quantize_codebook(w, code_map, block_size):
    """(codes, absmax) of the flat float32 sequence w; code_map in the order of the codes."""
    ranked = sorted(range(len(code_map)), key=lambda code: float(code_map[code]))  # stable: FP4 has two zeros
    values = [np.float32(code_map[code]) for code in ranked]
    midpoints = [(low + high) / np.float32(2) for low, high in zip(values, values[1:], strict=False)]
    codes, absmax = [], []
    for block in blocks(len(w), block_size):
        largest = max(abs(np.float32(w[i])) for i in block)
        inverse = np.float32(1) / max(largest, np.float32(1e-38))
        absmax.append(largest)
        for i in block:
            x = np.float32(w[i]) * inverse
            x = min(max(x, np.float32(-1)), np.float32(1))
            codes.append(ranked[sum(1 for t in midpoints if x > t)])
    return codes, absmax


def dequantize_codebook(codes, absmax, code_map, block_size):
    return [np.float32(code_map[c]) * np.float32(absmax[i // block_size]) for i, c in enumerate(codes)]


# ---- affine groups


def half(value):
    """Round to float16 and back, by the struct module."""
    return np.float32(struct.unpack("<e", struct.pack("<e", float(value)))[0])


def half_from_bits(bits):
    return struct.unpack("<e", struct.pack("<H", int(bits)))[0]


def quantize_affine(w, bits, group_size):
    """(codes, scales, offsets) of the flat float32 sequence w; scales and offsets rounded to float16 before
    the fit."""
    codes, scales, offsets = [], [], []
    top = 2**bits - 1
    for group in blocks(len(w), group_size):
        low, high = min(w[i] for i in group), max(w[i] for i in group)
        scale, offset = half((np.float32(high) - np.float32(low)) / np.float32(top)), half(low)
        scale = scale if scale > 0 else np.float32(1)
        scales.append(scale)
        offsets.append(offset)
        for i in group:
            q = round(
                float((np.float32(w[i]) - offset) / scale)
            )  # Python rounds halves to even, as rint does
            codes.append(min(max(q, 0), top))
    return codes, scales, offsets


def dequantize_affine(codes, scales, offsets, group_size):
    return [
        np.float32(np.float32(scales[i // group_size]) * np.float32(c)) + np.float32(offsets[i // group_size])
        for i, c in enumerate(codes)
    ]


# ---- products


def matmul(a, b):
    """a (n, k) times b (k, m), each element an exactly rounded sum of float64 products."""
    n, k, m = len(a), len(b), len(b[0])
    return np.array(
        [[math.fsum(float(a[i][t]) * float(b[t][j]) for t in range(k)) for j in range(m)] for i in range(n)]
    )


# ---- the transformer's mathematics (lists of Python floats, so always double precision)


def rms_norm(x, weight, eps):
    rms = math.sqrt(math.fsum(v * v for v in x) / len(x) + eps)
    return [w * v / rms for w, v in zip(weight, x, strict=True)]


def rope(head, position, theta):
    """Turn the pair (i, i + D/2) of one head by position·theta^(-2i/D), as a complex number."""
    half = len(head) // 2
    turned = [
        complex(head[i], head[i + half]) * complex(math.cos(a), math.sin(a))
        for i in range(half)
        for a in [position * theta ** (-2 * i / len(head))]
    ]
    return [z.real for z in turned] + [z.imag for z in turned]


def attention(q, k, v):
    """q (B, T, H, D), k and v (B, T, K, D): each query looks at its own past only."""
    B, T, H, D = np.shape(q)
    K = np.shape(k)[2]
    y = np.zeros((B, T, H, D))
    for b in range(B):
        for t in range(T):
            for h in range(H):
                kv = h // (H // K)
                scores = [
                    math.fsum(q[b][t][h][d] * k[b][s][kv][d] for d in range(D)) / math.sqrt(D)
                    for s in range(t + 1)
                ]
                largest = max(scores)
                weights = [math.exp(score - largest) for score in scores]
                for d in range(D):
                    y[b, t, h, d] = math.fsum(w * v[b][s][kv][d] for s, w in enumerate(weights)) / math.fsum(
                        weights
                    )
    return y


def silu(z):
    return z / (1 + math.exp(-z)) if z > -700 else 0.0


def gelu_tanh(z):
    return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def cross_entropy(logits, targets):
    """Sum over rows of -log softmax(row)[target]."""
    losses = []
    for row, target in zip(logits, targets, strict=True):
        largest = max(row)
        losses.append(largest + math.log(math.fsum(math.exp(z - largest) for z in row)) - row[target])
    return math.fsum(losses)


def group_sum(x, g):
    return [math.fsum(x[i : i + g]) for i in range(0, len(x), g)]


# ---- low-rank adaptation


def lora_delta(a, b, scaling, pool=1):
    """ΔW[o][i] = scaling · Σ_k B[o][k]·A[k][i // pool]."""
    out, r, groups = len(b), len(a), len(a[0])
    return np.array(
        [
            [scaling * math.fsum(b[o][k] * a[k][i // pool] for k in range(r)) for i in range(groups * pool)]
            for o in range(out)
        ]
    )


# ---- optimizers: one number at a time, in double precision


def adamw(p, grads, rates, beta1, beta2, eps, weight_decay):
    """A number's way through a list of gradients and rates (arXiv 1711.05101, Algorithm 2)."""
    m = v = 0.0
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        p = p - rate * (m_hat / (math.sqrt(v_hat) + eps) + weight_decay * p)
    return p


def sgd(p, grads, rates, momentum, weight_decay):
    u = 0.0
    for g, rate in zip(grads, rates, strict=True):
        u = momentum * u + g
        p = p - rate * (u + weight_decay * p)
    return p


def learning_rate(step, steps, peak, warmup, schedule):
    """Step counts from 0; the warm-up's last step reaches the peak."""
    if step < warmup:
        return peak / warmup * (step + 1)
    if schedule == "constant":
        return peak
    return peak * math.cos(math.pi / 2 * (step - warmup) / max(1, steps - warmup)) ** 2  # = (1 + cos)/2


def clip(grads, max_norm):
    """All gradients as one list: scaled to max_norm if longer; also the length before."""
    norm = math.sqrt(math.fsum(g * g for g in grads))
    return [g * max_norm / norm if norm > max_norm else g for g in grads], norm


def obq(w, hessian, damp, bits, group):
    """Round row by row as optimal brain quantization says, by eliminating each column from H⁻¹: GPTQ without
    Cholesky or blocks.

    Min/max groups of float16 scale and offset, fitted to the weights as they are when the group begins.
    Returns codes.
    """
    n = len(hessian)
    h = [[float(hessian[i][j]) for j in range(n)] for i in range(n)]
    mean = sum(h[i][i] for i in range(n)) / n
    for i in range(n):
        h[i][i] += damp * mean
    inverse = np.linalg.inv(np.array(h)).tolist()
    w = [[float(v) for v in row] for row in w]
    codes = [[0] * n for _ in w]
    scale, offset = [None] * len(w), [None] * len(w)
    for i in range(n):
        for r, row in enumerate(w):
            if i % group == 0:
                low, high = np.float32(min(row[i : i + group])), np.float32(max(row[i : i + group]))
                scale[r] = np.float32(np.float16((high - low) / np.float32(2**bits - 1))) or np.float32(1)
                offset[r] = np.float32(np.float16(low))
            code = int(min(max(np.rint((np.float32(row[i]) - offset[r]) / scale[r]), 0), 2**bits - 1))
            codes[r][i] = code
            error = (row[i] - float(np.float32(code) * scale[r] + offset[r])) / inverse[i][i]
            for j in range(i, n):
                row[j] -= error * inverse[i][j]
        pivot = list(inverse[i])
        for a in range(n):
            factor = inverse[a][i] / pivot[i]
            for b in range(n):
                inverse[a][b] -= factor * pivot[b]
            inverse[a][i] = 0.0
        for b in range(n):
            inverse[i][b] = 0.0
        inverse[i][i] = 1.0  # never used again
    return np.array(codes)
