"""The subcommands of ``megalr``: what each does, with an example, and the functions behind it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Run = Callable[[Sequence[str] | None, str | None], int | None]


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        name: as typed after ``megalr``.
        group: heading under which ``megalr --help`` lists it.
        module: of ``megalr.cli``, with ``NAME_parser(prog)`` and ``NAME_command(words, prog)``.
        summary: what it does, in one line.
        example: a command line.
        program: file of a checkout that does the same; None without one.
    """

    name: str
    group: str
    module: str
    summary: str
    example: str
    program: str | None = None

    def parser(self, prog: str | None = None) -> argparse.ArgumentParser:
        """The parser of its command line; ``prog`` as argparse takes it."""
        parser: argparse.ArgumentParser = self._function("parser")(prog)
        return parser

    def run(self, words: Sequence[str] | None, prog: str | None) -> int | None:
        """Parse ``words`` (None: this process's own), do the work; the exit code (None: 0)."""
        run: Run = self._function("command")
        return run(words, prog)

    def _function(self, kind: str) -> Any:
        module = importlib.import_module(f"megalr.cli.{self.module}")
        return getattr(module, f"{self.name}_{kind}")


_ALL = (
    Command(
        "tokenizer",
        "Data",
        "data",
        "Train a SentencePiece tokenizer on text.",
        "megalr tokenizer --input 'c4/*.json.gz' --vocab_size 32000 --output tokenizer/",
        "tools/train_tokenizer.py",
    ),
    Command(
        "data",
        "Data",
        "data",
        "Turn text into token shards with a manifest.",
        "megalr data --input 'c4/*.json.gz' --tokenizer tokenizer/ --output data/c4 --workers 16",
        "tools/preprocess_c4.py",
    ),
    Command(
        "inspect",
        "Data",
        "data",
        "Verify a data set and print its figures; exit code 1 if it is damaged.",
        "megalr inspect --data data/c4 --full",
        "tools/inspect_data.py",
    ),
    Command(
        "recipes",
        "Plan",
        "keys",
        "List the recipes and DeepSpeed JSONs that come with megalr, or print one.",
        "megalr recipes llama_60m_low_rank",
    ),
    Command(
        "keys",
        "Plan",
        "keys",
        "Explain the keys of a run's configuration: type, default, meaning.",
        "megalr keys optimizer",
    ),
    Command(
        "memory",
        "Plan",
        "memory",
        "Estimate the memory of a run per GPU, or propose what fits, the fastest first.",
        "megalr memory --config llama_1b_low_rank train.compile=true --gpus 8",
        "tools/estimate_memory.py",
    ),
    Command(
        "train",
        "Train",
        "train",
        "Train a model on the GPUs of this machine, or as a rank of any launcher.",
        "megalr train --config llama_60m_low_rank data.train=data/c4 --gpus 4",
        "launchers/pretrain.py",
    ),
    Command(
        "sweep",
        "Train",
        "sweep",
        "Run grids of runs on this machine or a cluster; results as table and figure.",
        "megalr sweep --config my_sweep.yaml --output sweeps/mine --per_gpu 2",
        "tools/sweep.py",
    ),
    Command(
        "submit",
        "Train",
        "submit",
        "Submit a run to SLURM: it saves in time, requeues itself and continues.",
        "megalr submit --config llama_1b --nodes 4 --gpus 8 --time 1-00:00:00",
        "launchers/submit.py",
    ),
    Command(
        "report",
        "Results",
        "reports",
        "Write a page about runs: interactive plots, ranking, events, settings.",
        "megalr report --run runs/A runs/B --output report.html",
        "tools/report.py",
    ),
    Command(
        "evaluate",
        "Results",
        "evaluate",
        "Perplexity of a checkpoint or of an exported model; or lm-eval's tasks.",
        "megalr evaluate --run runs/NAME --data data/other",
        "launchers/evaluate.py",
    ),
    Command(
        "generate",
        "Results",
        "generate",
        "Let a run's model or an exported one continue a text.",
        "megalr generate --run runs/NAME --prompt 'The sea' --max_new_tokens 50 --top_p 0.9",
    ),
    Command(
        "ranks",
        "Results",
        "rank_budget",
        "Choose the ranks of a run's matrices by their singular values.",
        "megalr ranks --run runs/NAME --output runs/NAME_ranks",
    ),
    Command(
        "export",
        "Other formats",
        "formats",
        "Write a run's model as a folder that transformers loads.",
        "megalr export --run runs/NAME --output out/",
        "tools/export_hf.py",
    ),
    Command(
        "import",
        "Other formats",
        "formats",
        "Error of a pretrained model's matrices as factors, by rank.",
        "megalr import --model models/llama-2-7b --method low_rank --rank 128 256 512",
        "tools/import_hf.py",
    ),
    Command(
        "factorize",
        "Other formats",
        "formats",
        "Write a dense transformers model with its matrices as factors.",
        "megalr factorize --model models/llama-2-7b --output out/ --rank 1024",
        "tools/factorize_hf.py",
    ),
    Command(
        "reshape",
        "Other formats",
        "formats",
        "Write a checkpoint in DeepSpeed's universal layout: whole tensors.",
        "megalr reshape --run runs/NAME",
        "tools/reshape_checkpoint.py",
    ),
    Command(
        "completion",
        "Shell",
        "completion",
        "Print a script with which bash, zsh or fish completes command lines.",
        "megalr completion bash > ~/.local/share/bash-completion/completions/megalr",
    ),
)

COMMANDS = {command.name: command for command in _ALL}
"""All of them by name, in the order of the help."""
