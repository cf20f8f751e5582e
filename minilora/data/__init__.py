"""Text and tasks: tokenizers, the corpora every machine has, the tasks that adapters are compared on, data of
your own."""

from minilora.data.corpora import corpus_sha256, pretraining_tokens, python_source, read_text
from minilora.data.products import catalogue_text
from minilora.data.sft import SFTTask, products_chat, read_jsonl
from minilora.data.tasks import TASK_NAMES, Batch, Task, make_task
from minilora.data.text import TextTokenizer
from minilora.data.tokenizer import BOS, EOS, PAD, VOCAB_SIZE, ByteTokenizer, Tokenizer, decode, encode

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "TASK_NAMES",
    "VOCAB_SIZE",
    "Batch",
    "ByteTokenizer",
    "SFTTask",
    "Task",
    "TextTokenizer",
    "Tokenizer",
    "catalogue_text",
    "corpus_sha256",
    "decode",
    "encode",
    "make_task",
    "pretraining_tokens",
    "products_chat",
    "python_source",
    "read_jsonl",
    "read_text",
]
