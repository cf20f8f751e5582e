"""Against bitsandbytes' AdamW8bit on the CPU: what is quantized, every step from the same states, many steps
on their own.

Its CPU code looks codes up in a table of 65536 bins over [-1, 1], so its code may be that of a number a bin
away from the moment; ours is the nearest one's (and for a v above 0 not 0). Decoded values, scales and thus a
step from the same states are the same up to rounding.
"""

from __future__ import annotations

import numpy as np
import pytest

from minilora.config import TrainConfig
from minilora.parameters import Gradients, Parameter
from minilora.quant import codebooks
from minilora.training.optimizers import make_optimizer

pytestmark = pytest.mark.peers
EPS = float(np.finfo(np.float32).eps)
BIN = 2 / 65535
SHAPES = ((4095,), (4096,), (5000,), (96, 128))


@pytest.fixture(scope="module")
def bnb(torch):
    """bitsandbytes.optim."""
    return pytest.importorskip("bitsandbytes.optim")


class Pair:
    """The same parameters in both, and the same gradients at each step: of several magnitudes, some 0."""

    def __init__(self, torch, bnb, name, decay):
        rng = np.random.default_rng(0)
        start = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
        self.torch, self.rng = torch, rng
        self.ours = [Parameter(str(i), a.copy(), True) for i, a in enumerate(start)]
        self.theirs = [torch.nn.Parameter(torch.from_numpy(a.copy())) for a in start]
        self.optimizer = make_optimizer(self.ours, TrainConfig(optimizer=name, weight_decay=decay))
        kind = {"adamw": bnb.AdamW32bit, "adamw_8bit": bnb.AdamW8bit}[name]
        self.peer = kind(self.theirs, lr=1e-2, weight_decay=decay)

    def step(self):
        grads = Gradients(self.ours)
        for p, q in zip(self.ours, self.theirs, strict=True):
            size = 10.0 ** self.rng.uniform(-3, 0, p.data.shape)
            grads[p][...] = (
                self.rng.standard_normal(p.data.shape) * size * (self.rng.random(p.data.shape) > 0.02)
            )
            q.grad = self.torch.from_numpy(grads[p].copy())
        self.optimizer.step(grads, 1e-2)
        self.peer.step()

    def their_states(self, i):
        """{"m", "v", and where quantized "m_absmax", "v_absmax"} of parameter i, as live NumPy arrays."""
        state = self.peer.state[self.theirs[i]]
        names = {"m": "state1", "v": "state2", "m_absmax": "absmax1", "v_absmax": "absmax2"}
        return {ours: state[theirs].numpy() for ours, theirs in names.items() if theirs in state}


def decoded(codes, absmax, signed):
    return codebooks.dynamic_map(signed)[codes.reshape(-1)] * np.repeat(absmax, 256)[: codes.size]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_same_step_from_the_same_states(torch, bnb, decay, record_property):
    pair = Pair(torch, bnb, "adamw_8bit", decay)
    different = total = 0
    for _ in range(8):
        before = [p.data.copy() for p in pair.ours]
        pair.step()
        state = pair.optimizer.state()
        for i, (p, q) in enumerate(zip(pair.ours, pair.theirs, strict=True)):
            theirs = pair.their_states(i)
            ours = {kind: state[f"{kind}.{p.name}"] for kind in theirs}
            assert {k: (a.dtype, a.shape) for k, a in ours.items()} == {
                k: (a.dtype, a.shape) for k, a in theirs.items()
            }
            assert ("m_absmax" in theirs) == (p.data.size >= 4096)
            # p, its step and its decay, each a few roundings
            moved = np.abs(p.data - before[i]).max()
            assert np.abs(p.data - q.detach().numpy()).max() <= EPS * (
                2 * np.abs(before[i]).max() + 8 * moved
            )
            if "m_absmax" in theirs:
                for kind, signed in (("m", True), ("v", False)):
                    scales, codes, their_codes = (
                        ours[f"{kind}_absmax"],
                        ours[kind].reshape(-1),
                        theirs[kind].reshape(-1),
                    )
                    assert np.allclose(scales, theirs[f"{kind}_absmax"], rtol=4 * EPS, atol=0)
                    # ours lies within a bin (and a rounding) of the middle between the codes that theirs
                    # could be
                    values = codebooks.dynamic_map(signed).astype(np.float64)
                    low, high = (
                        np.minimum(codes, their_codes).astype(int),
                        np.maximum(codes, their_codes).astype(int),
                    )
                    apart = codes != their_codes
                    above_low = (values[low] + values[np.minimum(low + 1, 255)]) / 2
                    below_high = (values[high - 1] + values[high]) / 2
                    assert (below_high - above_low)[apart].max(initial=0) <= BIN + 4 * EPS
                    different, total = different + int(apart.sum()), total + codes.size
            for kind, array in ours.items():  # the next step begins the same, in all bits
                array[...] = theirs[kind]
            p.data[...] = q.detach().numpy()
    record_property("codes that differ", f"{different} of {total}")
    print(f"\ncodes that differ: {different} of {total}", end="")
    assert 0 < different < 0.1 * total


def test_many_steps_on_their_own(torch, bnb):
    """Rounding differs in v near 0, which their table raises: so most parameters stay close, and none goes
    astray."""
    pair, exact = Pair(torch, bnb, "adamw_8bit", 0.0), Pair(torch, bnb, "adamw", 0.0)
    start = [p.data.copy() for p in pair.ours]
    for _ in range(20):
        pair.step()
        exact.step()
    for i, (p, q) in enumerate(zip(pair.ours, pair.theirs, strict=True)):
        moved = np.abs(exact.ours[i].data - start[i]).mean()
        ours, theirs = (np.abs(a - exact.ours[i].data).mean() for a in (p.data, q.detach().numpy()))
        print(
            f"\n{SHAPES[i]}: moved {moved:.2e}, 8 bits change {ours:.2e}, bitsandbytes' {theirs:.2e}", end=""
        )
        assert (
            (ours < 1e-6 and theirs < 1e-6)
            if p.data.size < 4096
            else 0 < ours < min(0.1 * moved, 1.5 * theirs)
        )


def test_without_8_bits(torch, bnb):
    pair = Pair(torch, bnb, "adamw", 0.1)
    for _ in range(20):
        pair.step()
    for p, q in zip(pair.ours, pair.theirs, strict=True):
        assert np.abs(p.data - q.detach().numpy()).max() <= 20 * 4 * EPS * np.abs(p.data).max()


def test_their_table_keeps_v_above_zero(torch, bnb):
    """The reason why ours does: the lowest bin's code is not 0, so v never becomes 0 on a CPU."""
    import bitsandbytes.functional as F

    v = torch.zeros(256)
    v[0], v[1] = 1.0, 1e-9
    codes, _ = torch.ops.bitsandbytes.quantize_blockwise(v, F.create_dynamic_map(signed=False), 256)
    print(f"\ncode of 1e-9: {int(codes[1])}, of 0: {int(codes[2])}", end="")
    nearest = int((F.create_dynamic_map(signed=False) - v[1]).abs().argmin())
    assert nearest == 0 <= int(codes[1]) <= 16
