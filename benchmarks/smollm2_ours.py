"""minilora's side on a GGUF: trained and read as the command line does it."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import workload
from benchmarks.ours import SMALL, Ours, adopt, set_adapters
from minilora.config import LoraConfig, QuantConfig
from minilora.formats.huggingface import save_huggingface
from minilora.formats.llama_gguf import load_gguf
from minilora.generation import generate
from minilora.injection import inject_lora
from minilora.lora import LoraLinear
from minilora.quant.model import dequantize_model, quantize_model
from minilora.quant.weights import CodebookWeight
from minilora.training.allocator import keep_freed_memory

Array = np.ndarray


class OursGGUF(Ours):
    """A GGUF made ready for a method; the works "fast" and "small" are one step each."""

    def __init__(self, path: str, threads: int = 2):
        super().__init__(threads, keep=False)  # memory is kept from the first step on, as the Trainer does it
        self.path = path

    def write_folder(self, folder: str) -> None:
        """Write the dequantized model as a float32 Hugging Face folder, the input of the peers."""
        save_huggingface(dequantize_model(load_gguf(self.path)), folder)

    def load(
        self,
        method: str,
        ids: Array,
        targets: Array,
        adapters: dict[str, Array] | None = None,
        states: dict[str, tuple[Array, ...]] | None = None,
    ) -> None:
        """Load for `lora` (dense), `qlora` (NF4) or `qalora` (blocks as stored).

        `states` are bitsandbytes' codes, which replace our own.
        """
        self.works.clear()
        self.model = self.optimizer = None
        base = load_gguf(self.path)
        if method == "lora":
            base = dequantize_model(base, table=False)
        elif method == "qlora":
            base = quantize_model(base, QuantConfig("nf4"))
        if states is not None:
            self.same_codes = _same_codes(base, states)
            base = base.map_linears(lambda linear: adopt(linear, states))
        config = LoraConfig(workload.R, workload.ALPHA, use_qalora=method == "qalora")
        model = inject_lora(base, config, np.random.default_rng(0))
        del base
        if adapters is not None:
            set_adapters(model, adapters)
        keep_freed_memory()
        self._ready(model, ids, targets)

    def loss_of_small(self) -> float:
        """Return the loss as the work "small" computes it."""
        return self._loss_and_grads(**SMALL)[0]

    def codes_equal(self) -> float:
        """Return the share of bytes of NF4 codes that equalled bitsandbytes' before those replaced them."""
        return self.same_codes

    def prepare_writing(self, label: str, prompts: list[list[int]], tokens: int) -> None:
        """Prepare the work `label`: greedy text from the file as it is stored."""
        if self.model is None:
            self.model = load_gguf(self.path)
        self.works[label] = lambda: generate(self.model, prompts, tokens)
        self.works[f"{label} logits"] = lambda: self.model.logits(np.array(prompts))[:, -1]


def _same_codes(model: Any, states: dict[str, tuple[Array, ...]]) -> float:
    """Return the share of bytes of packed codes that are those of `states`."""
    equal = count = 0
    for name, linear in model.linears():
        weight = (linear.base if isinstance(linear, LoraLinear) else linear).weight
        if isinstance(weight, CodebookWeight):
            equal += int((weight.codes == states[name][0]).sum())
            count += weight.codes.size
    return equal / count
