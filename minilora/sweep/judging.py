"""A trained model → its measures on held-out examples."""

from __future__ import annotations

from tqdm.auto import tqdm

from minilora import memory
from minilora.config import ADAPTERS
from minilora.data.tasks import Task
from minilora.data.tokenizer import Tokenizer
from minilora.generation import generate
from minilora.sweep.deploying import deploy
from minilora.sweep.settings import RunConfig
from minilora.threads import Workers, single_blas
from minilora.training.evaluation import evaluate
from minilora.transformer import Transformer


def judge(
    config: RunConfig,
    model: Transformer,
    task: Task,
    tokenizer: Tokenizer,
    workers: Workers,
    progress: bool = False,
) -> dict[str, float]:
    """Return the measures of a trained model and, with the prefix `deployed_`, of its deployed weights."""
    split = config.data.split
    written: tuple[str, ...] = ("test", "test_values") if config.write_all else ("test",)
    row = measure(model, task, split, tokenizer, workers, written, progress)
    if config.method in ADAPTERS:
        deployed = deploy(config, model)
        written = ("test",) if config.write_all else ()
        found = measure(deployed, task, split, tokenizer, workers, written, progress)
        row |= {f"deployed_{name}": value for name, value in found.items()}
        row["deployed_effective_bits"] = memory.effective_bits(deployed)
    return row


def measure(
    model: Transformer,
    task: Task,
    split: str,
    tokenizer: Tokenizer,
    workers: Workers | None = None,
    written: tuple[str, ...] = ("test", "test_values"),
    progress: bool = False,
) -> dict[str, float]:
    """Return the loss on a split and, on the test split, the scores of what the model writes.

    `written` names the sets of prompts to write for, as far as the task has them.
    """
    found = dict(evaluate(model, task.eval_batches(split), workers, progress))
    for name in written:
        if split == "test" and name in task.splits and (prompts := task.prompts(name)):
            texts = write(model, prompts, task.max_new_tokens, tokenizer, workers, progress)
            ending = "_values" if name == "test_values" else ""
            found |= {measure + ending: value for measure, value in task.score(name, texts).items()}
    return found


def write(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    tokenizer: Tokenizer,
    workers: Workers | None = None,
    progress: bool = False,
) -> list[str]:
    """Return greedy continuations as text; prompts go in pieces, which keeps caches and logits small."""
    size = 50 if model.config.vocab_size < 1000 else 25
    pieces = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    bar = tqdm(total=len(prompts), desc="write", unit="text", disable=not progress, leave=False)

    def one(piece: list[list[int]]) -> list[list[int]]:
        # one thread each: the pieces run in parallel
        texts = generate(model, piece, max_new_tokens, eos=tokenizer.stop_ids, threads=1)
        bar.update(len(piece))
        return texts

    with single_blas(), bar:
        results = [one(piece) for piece in pieces] if workers is None else workers.map(one, pieces)
    return [tokenizer.decode(tokens) for piece in results for tokens in piece]
