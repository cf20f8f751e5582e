"""Start a tiny base with an induction circuit, so that it learns to copy within minutes.

An induction head (arXiv 2209.11895) completes "… a b … a" with b. From random weights it forms late and
suddenly: the tiny model had learned nothing of it after 4 million tokens. But its two layers can be written
down:

* block 0, heads 0, 1, 2 attend one, two and three places back and write what stands there into subspaces of
  their own;
* block 1, heads 0 and 1 look for places whose last three tokens are the present three (the query reads t,
  t−1, t−2, the key t−1, t−2, t−3: one place further back) and copy the token that stands there.

Everything trains on from this start; nothing is frozen.
"""

from __future__ import annotations

import numpy as np

from minilora.config import require
from minilora.parameters import Array
from minilora.threads import single_blas
from minilora.transformer import Transformer


def orthonormal(rng: np.random.Generator, rows: int, columns: int, avoid: Array) -> Array:
    """Return random orthonormal columns (rows, columns), orthogonal to the columns of `avoid`."""
    z = rng.standard_normal((rows, columns))
    return np.linalg.qr(z - avoid @ (avoid.T @ z))[0]


@single_blas()
def start_with_induction(model: Transformer, rng: np.random.Generator, std: float = 0.02) -> None:
    """Write the circuit into the embedding and the attention of the first two blocks, in place.

    Rotary positions turn pair i of a query and a key by (t_q − t_k)·θᵢ. Fast pairs (large θ) tell places one
    step apart: a query turned by −d·θᵢ against the key makes the score Σ cos((t_q − t_k − d)·θᵢ), largest d
    places back. Slow pairs hardly turn over a context, so they can compare contents at any distance.

    Parameters
    ----------
    model : Transformer
        Trainable, with at least two blocks and three heads of keys and values.
    rng : np.random.Generator
        Draws the subspaces.
    std : float
        Standard deviation of a freshly initialised embedding.
    """
    c, head = model.config, model.config.head_dim
    require(
        c.num_hidden_layers >= 2,
        "num_hidden_layers",
        c.num_hidden_layers,
        "an induction circuit needs two blocks",
    )
    require(
        min(c.num_attention_heads, c.num_key_value_heads) >= 3,
        "num_key_value_heads",
        c.num_key_value_heads,
        "at least 3",
    )
    require(
        c.hidden_size >= 3 * head + 1, "hidden_size", c.hidden_size, f"three subspaces of {head} must fit"
    )
    theta = c.rope_theta ** (-np.arange(0, head, 2) / head)  # (D/2,)
    fast, slow = theta > 0.03, np.flatnonzero(theta < 0.008)
    require(
        len(slow) >= 3,
        "rope_theta",
        c.rope_theta,
        "too small: no pair turns slowly enough to compare contents",
    )

    # each embedding is a common part, from which positions are read, plus a content of its own, equally long
    table = model.embedding.weight.dense()  # the array itself
    common = orthonormal(rng, c.hidden_size, 1, np.zeros((c.hidden_size, 1)))  # (C, 1)
    content = table - (table @ common) @ common.T
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    size = std * c.hidden_size**0.5
    table[...] = size * (content + common.T)

    read = orthonormal(rng, c.hidden_size, head, common)  # (C, D): what a head sees of a content
    # where t−1, t−2, t−3 are written
    places = orthonormal(rng, c.hidden_size, 3 * head, common).reshape(c.hidden_size, 3, head)
    q, k, v, o = (
        getattr(model.blocks[0].attention, n).weight.param.data
        for n in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    for back in (1, 2, 3):
        rows = slice((back - 1) * head, back * head)
        q[rows] = 1.2 * np.outer(
            np.concatenate([np.cos(theta * back) * fast, -np.sin(theta * back) * fast]), common
        )
        k[rows] = 1.2 * np.outer(np.concatenate([fast, 0 * theta]), common)
        v[rows] = read.T
        # as long as an embedding's content
        o[:, rows] = size / (c.hidden_size / 8) ** 0.5 * places[:, back - 1]

    slow_dims = np.concatenate([slow, slow + head // 2])
    copied = orthonormal(rng, c.hidden_size, 2 * head, common)
    q, k, v, o = (
        getattr(model.blocks[1].attention, n).weight.param.data
        for n in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    # (query's, key's)
    readers = (read, places[:, 0]), (places[:, 0], places[:, 1]), (places[:, 1], places[:, 2])
    for h in (0, 1):
        rows = slice(h * head, (h + 1) * head)
        q[rows], k[rows] = 0, 0
        for third, (query, key) in enumerate(readers):
            dims = slow_dims[third::3]
            mix = orthonormal(rng, head, len(dims), np.zeros((head, 1)))
            # sharp enough to be useful, and so to be kept, from the first step
            q[h * head + dims] = 1.8 * (query @ mix).T
            k[h * head + dims] = 1.8 * (key @ mix).T
        v[rows] = copied[:, rows].T
        o[:, rows] = 0.5 * size * copied[:, rows]
