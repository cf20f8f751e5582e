"""The peers' side: transformers' Llama with PEFT and bitsandbytes, on the same weights, batches and adapters.

Each choice is the fastest one here or the library's default: sdpa attention, fused AdamW (the default of
transformers' Trainer), no attention mask, `use_cache=False`. The allocator keeps freed memory, as on our
side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import workload
from benchmarks.timing import peak_mib, reset_peak, resident_mib, timed

warnings.simplefilter("ignore")  # the libraries' own; set before they are loaded

import bitsandbytes as bnb  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

from minilora.config import LINEAR_MODULES, ModelConfig  # noqa: E402
from minilora.training.allocator import keep_freed_memory  # noqa: E402

Array = np.ndarray


class Peers:
    """The same interface as `Ours`."""

    def __init__(self, threads: int = 2, keep: bool = True):
        if keep:
            # as on our side: bitsandbytes' products at 4096² are 2 to 4 times faster with it
            keep_freed_memory()
        self.threads = threads
        self.works: dict[str, tuple[int, Callable[[], Any]]] = {}  # label → (threads, work)

    def timed(self, label: str, n: int) -> float:
        """Return the seconds of one call of a prepared work, from n in a row."""
        threads, work = self.works[label]
        torch.set_num_threads(threads)
        return timed(work, n)

    def result(self, label: str) -> Any:
        """Return what a prepared work returns."""
        return self.works[label][1]()

    def reset_peak(self) -> None:
        """Forget the largest memory so far."""
        reset_peak()

    def peak_mib(self) -> float | None:
        """Return the largest memory of this process since then."""
        return peak_mib()

    def loaded_mib(self) -> float | None:
        """Return the resident memory before the first step, and count the peak from here.

        Every stored array is read once first: the pages of a mapped file belong to what is loaded.
        """
        for tensor in self.model.parameters():
            tensor.detach().max()  # a mapped file's pages belong to what is loaded
        reset_peak()
        return resident_mib()

    # ---- training step

    def build(
        self,
        name: str,
        method: str,
        weights: dict[str, Array] | None = None,
        adapters: dict[str, Array] | None = None,
        checkpoint: bool = False,
    ) -> None:
        """Make a model of a size ready for `full`, `lora` or `qlora`; arrays given replace the size's own."""
        torch.set_num_threads(self.threads)
        self.works.clear()
        self.model: Any = None
        size = workload.SIZES[name]
        model: Any = llama(size.config, workload.weights(size) | (weights or {}))
        if method == "qlora":
            model = quantized(model)
        if checkpoint:
            checkpointed(model)
        if method != "full":
            model = adapted(model)
        self._ready(model, *workload.batch(size), workload.adapters(size) | (adapters or {}))

    def _ready(
        self,
        model: Any,
        ids: Array,
        targets: Array,
        adapters: dict[str, Array] | None,
        learning_rate: float = workload.LEARNING_RATE,
    ) -> None:
        """Keep the model and its batch; the work "step" trains it once."""
        self.model = model.train()
        with torch.no_grad():
            for key, p in self._trainable().items():
                if "lora_" in key and adapters:
                    p.copy_(torch.from_numpy(adapters[key]))
        self.ids, self.targets = torch.from_numpy(ids), torch.from_numpy(targets)
        parameters = list(self._trainable().values())
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, workload.MAX_NORM)
            optimizer.step()
            return loss.detach()

        self.works["step"] = self.threads, step

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {
            name.removeprefix("base_model.model.").replace(".default.", "."): p
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }

    def _loss(self) -> torch.Tensor:
        return self.model(
            input_ids=self.ids, labels=self.targets, shift_labels=self.targets, use_cache=False
        ).loss

    def loss(self) -> tuple[float, list[str]]:
        """Return the loss, and the names of the arrays that have a gradient."""
        self.model.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        return float(loss), list(self._trainable())

    def gradient(self, name: str) -> Array:
        """Return the gradient of one array, and forget it."""
        p = self._trainable()[name]
        gradient: Any = p.grad
        p.grad = None
        return gradient.numpy()

    def states(self) -> dict[str, tuple[Array, ...]]:
        """Return bitsandbytes' quantized weights: packed codes, absmax codes, absmax of those, offset."""
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit) and name.endswith(".base_layer"):
                weight: Any = module.weight
                state = weight.quant_state
                arrays = (weight.data, state.absmax, state.state2.absmax, state.offset)
                key = name.removeprefix("base_model.model.").removesuffix(".base_layer")
                found[key] = tuple(a.numpy().reshape(-1) for a in arrays)
        return found

    # ---- kernels

    def prepare(self, label: str, op: str, kind: str, n: int, batch: int, threads: int) -> None:
        """Prepare "quantize", "dequantize" or "product" on a weight (n, n) of kind "nf4" or "dense"."""
        w, x = (torch.from_numpy(a) for a in workload.matrices(n, batch))
        packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")

        def quantize() -> list[tuple[Array, Array]]:
            codes, fresh = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
            return [(codes.numpy().reshape(-1), fresh.absmax.numpy())]

        def product() -> list[Array]:
            with torch.no_grad():
                y = x @ w.T if kind == "dense" else bnb.matmul_4bit(x, packed.t(), quant_state=state)
            return [y.numpy()]

        def dequantize() -> list[Array]:
            return [bnb.functional.dequantize_4bit(packed, state).numpy()]

        self.works[label] = threads, {"quantize": quantize, "dequantize": dequantize, "product": product}[op]

    # ---- generation

    def prepare_generation(
        self, config: ModelConfig, weights: dict[str, Array], batch: int, tokens: int
    ) -> None:
        """Prepare greedy text with the given weights."""
        self._write(llama(config, weights).eval(), workload.prompts(batch), tokens)

    def _write(self, model: Any, prompts: list[list[int]], tokens: int) -> None:
        """Prepare the works "generate", greedy text, and "logits" after the prompts (of one length)."""
        ids = torch.tensor(prompts)
        settings = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )

        @torch.no_grad()
        def write() -> list[list[int]]:
            written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            return written[:, ids.shape[1] :].tolist()

        @torch.no_grad()
        def logits() -> Array:
            return model(ids).logits[:, -1].numpy()

        self.works |= {"generate": (self.threads, write), "logits": (self.threads, logits)}


def checkpointed(model: Any) -> None:
    """Make transformers compute each block again in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def adapted(model: Any, r: int = workload.R) -> Any:
    """Return the model with PEFT's LoRA on all projections."""
    config = peft.LoraConfig(r=r, lora_alpha=int(workload.ALPHA), target_modules=list(LINEAR_MODULES))
    return peft.get_peft_model(model, config)


def llama(config: ModelConfig, weights: dict[str, Array]) -> Any:
    """Return transformers' model over the given arrays, without a copy."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
    )
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    model = LlamaForCausalLM(
        LlamaConfig(
            **{name: getattr(config, name) for name in names},
            rope_parameters=rope,
            max_position_embeddings=config.context_length,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.load_state_dict(
        {name: torch.from_numpy(np.array(a)) for name, a in weights.items()}, strict=False, assign=True
    )
    model.tie_weights()
    return model


def quantized(model: Any, double_quant: bool = True) -> Any:
    """Replace the projections by bitsandbytes' NF4 layers, as transformers does on loading."""
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in LINEAR_MODULES:
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.float32,
                compress_statistics=double_quant,
                quant_type="nf4",
            )
            layer.load_state_dict(module.state_dict())
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, layer.to("cpu"))  # .to() quantizes
    model.is_loaded_in_4bit = True  # PEFT looks here
    return model
