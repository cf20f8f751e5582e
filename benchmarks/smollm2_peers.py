"""The peers' side on a Hugging Face folder: `from_pretrained`, PEFT, and bitsandbytes for QLoRA."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

from benchmarks.peers import Peers, adapted, checkpointed
from minilora.training.allocator import keep_freed_memory

Array = np.ndarray
logging.set_verbosity_error()
logging.disable_progress_bar()


class PeersFolder(Peers):
    """A folder made ready for a method; the work "step" is one step."""

    def __init__(self, folder: str, threads: int = 2):
        super().__init__(threads, keep=False)
        self.folder = folder
        torch.set_num_threads(threads)

    def load(
        self,
        method: str,
        ids: Array,
        targets: Array,
        adapters: dict[str, Array] | None = None,
        checkpoint: bool = False,
        keep: bool = True,
    ) -> None:
        """Load for `lora` (float32) or `qlora` (NF4, double quantized, computing in float32).

        With `keep` the allocator keeps freed memory. That is faster and takes more memory; users of PEFT do
        without it.
        """
        self.works.clear()
        self.model: Any = None
        options: dict[str, Any] = {}
        if method == "qlora":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **options)
        if checkpoint:
            checkpointed(model)
        if keep:
            keep_freed_memory()
        self._ready(adapted(model), ids, targets, adapters)

    def loss(self) -> tuple[float, list[str]]:
        """Return the loss in float64 from the float32 logits, and the names of arrays that have a gradient.

        transformers' own loss, which "step" runs, adds 49152 exponentials in float32. It errs by 2e-5, and
        gradients of this model by up to 2e-3 of their largest element, a hundred times what all else does.
        """
        self.model.zero_grad(set_to_none=True)
        logits = self.model(input_ids=self.ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), self.targets.flatten())
        loss.backward()
        return float(loss), list(self._trainable())

    def prepare_writing(self, label: str, prompts: list[list[int]], tokens: int) -> None:
        """Prepare the work `label`: greedy text with the float32 weights."""
        if not hasattr(self, "writer"):
            self.writer = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
            keep_freed_memory()
        self._write(self.writer, prompts, tokens)
        self.works[label], self.works[f"{label} logits"] = (
            self.works.pop("generate"),
            self.works.pop("logits"),
        )
