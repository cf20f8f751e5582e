"""Text and tasks: a byte tokenizer, the corpora every machine has, and the tasks that adapters are compared on."""

from minilora.data.corpora import corpus_sha256, pretraining_tokens, python_source, read_text
from minilora.data.products import catalogue_text
from minilora.data.tasks import TASK_NAMES, Batch, Task, make_task
from minilora.data.tokenizer import BOS, EOS, PAD, VOCAB_SIZE, decode, encode

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "TASK_NAMES",
    "VOCAB_SIZE",
    "Batch",
    "Task",
    "catalogue_text",
    "corpus_sha256",
    "decode",
    "encode",
    "make_task",
    "pretraining_tokens",
    "python_source",
    "read_text",
]
