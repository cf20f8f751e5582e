"""Text and tasks: tokenizers, corpora, the tasks that adapters are compared on, and your own examples."""
