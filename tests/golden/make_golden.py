"""Make the golden files: logits, loss and all gradients of transformers' LlamaForCausalLM on small random
models.

    python tests/golden/make_golden.py  # needs torch and transformers; the test needs neither

Each file holds the weights as well, since NumPy does not promise the same random numbers in its next version.
All is float32, as torch computes it. The GELU files replace each MLP by down(gelu_tanh(up(x))), composed of
torch's own parts.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from minilora.building import parameter_shapes
from minilora.config import ModelConfig

HERE = Path(__file__).parent
CONFIGS = {
    "gqa_untied": ModelConfig(
        vocab_size=29,
        hidden_size=24,
        intermediate_size=34,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        context_length=16,
        tie_word_embeddings=False,
    ),
    "mha_tied": ModelConfig(
        vocab_size=31,
        hidden_size=20,
        intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        context_length=16,
        rope_theta=500.0,
    ),
    "mqa_odd": ModelConfig(
        vocab_size=37,
        hidden_size=18,
        intermediate_size=13,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        context_length=16,
        rms_norm_eps=1e-3,
        tie_word_embeddings=False,
    ),
    "one_head_tied": ModelConfig(
        vocab_size=11,
        hidden_size=14,
        intermediate_size=9,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        context_length=16,
    ),
    "gelu_untied": ModelConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=27,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        context_length=16,
        tie_word_embeddings=False,
        hidden_act="gelu_pytorch_tanh",
    ),
}


def random_arrays(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Float32 weights large enough that every nonlinearity bends."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            (1 + 0.3 * rng.standard_normal(shape))
            if len(shape) == 1
            else rng.standard_normal(shape) * (0.7 if "embed" in name else 1.2 / shape[1] ** 0.5)
        ).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }


def random_batch(
    config: ModelConfig, seed: int, B: int = 3, T: int = 11
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, targets (B, T) and a mask that is true for most targets."""
    rng = np.random.default_rng([seed, 1])
    return (
        rng.integers(config.vocab_size, size=(B, T)),
        rng.integers(config.vocab_size, size=(B, T)),
        rng.random((B, T)) < 0.7,
    )


def torch_model(config: ModelConfig, arrays: dict[str, np.ndarray]) -> Any:
    """transformers' model of the same configuration with these weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    class TwoMatrixMLP(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = torch.nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            self.down_proj = torch.nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

        def forward(self, x: Any) -> Any:
            return self.down_proj(torch.nn.functional.gelu(self.up_proj(x), approximate="tanh"))

    settings = asdict(config)
    theta, context, _ = (settings.pop(field) for field in ("rope_theta", "context_length", "rope_factors"))
    settings["hidden_act"] = "silu"
    model = LlamaForCausalLM(
        LlamaConfig(
            **settings,
            max_position_embeddings=context,
            attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    )
    if config.hidden_act != "silu":
        for layer in model.model.layers:
            layer.mlp = TwoMatrixMLP()
    missing, unexpected = model.load_state_dict(
        {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}, strict=False
    )
    if (
        unexpected
        or set(missing) - {"lm_head.weight"}
        or ("lm_head.weight" in missing) != config.tie_word_embeddings
    ):
        raise RuntimeError(f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.float().eval()


def reference(
    config: ModelConfig, arrays: dict[str, np.ndarray], ids: np.ndarray, targets: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits, mean loss over the masked targets, and the gradient of every parameter, by torch's autograd."""
    import torch

    model = torch_model(config, arrays)
    logits = model(input_ids=torch.from_numpy(ids)).logits
    labels = torch.from_numpy(np.where(mask, targets, -100))
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, config.vocab_size), labels.reshape(-1)
    )  # ignores -100
    loss.backward()
    named = dict(model.named_parameters())
    return logits.detach().numpy(), loss.item(), {name: named[name].grad.numpy() for name in arrays}


def main() -> None:
    """Write one file a configuration."""
    import torch
    import transformers

    torch.set_num_threads(1)
    total = 0
    for seed, (name, config) in enumerate(CONFIGS.items()):
        arrays = random_arrays(config, seed)
        ids, targets, mask = random_batch(config, seed)
        logits, loss, gradients = reference(config, arrays, ids, targets, mask)
        about = json.dumps(
            asdict(config) | {"torch": torch.__version__, "transformers": transformers.__version__}
        )
        path = HERE / f"{name}.npz"
        np.savez_compressed(
            path,
            about=np.array(about),
            ids=ids.astype(np.uint8),
            targets=targets.astype(np.uint8),
            mask=mask,
            logits=logits,
            loss=np.float64(loss),
            **{f"w.{k}": v for k, v in arrays.items()},
            **{f"g.{k}": v for k, v in gradients.items()},
        )
        total += path.stat().st_size
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, loss {loss:.6f}")
    print(f"{total / 1000:.0f} kB in all")


if __name__ == "__main__":
    main()
