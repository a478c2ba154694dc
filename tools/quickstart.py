"""From nothing to two trained low-rank models, without and with restarts, side by side.

Text, tokenizer, shards, two runs, one report, an export, generated text. Runs the command lines
that one would type, prints each, and skips those whose results are there.

python tools/quickstart.py [--input 'path/*.json.gz'] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalr.cli.command_line import in_order, parse
from megalr.errors import UserError, exit_cleanly
from megalr.files import disk_errors, write_atomic
from megalr.run.metrics_reader import perplexity_change, read_run

OVERRIDE = re.compile(r"[a-z_0-9]+(\.[a-z_0-9]+)+=")
RESTARTS = ("restarts.every=25",)
"""What the second run has and the first has not."""
PROMPT = "This function returns"


@dataclass(frozen=True)
class Step:
    """One command line, what it reads and what it makes.

    ``outputs`` are files or folders; those in ``replaced`` are deleted before the command runs,
    for programs that do not write into a folder that is there. ``environment`` is added to the
    process's own. ``passing`` are words of the command that do not matter to the outputs.
    """

    name: str
    command: Sequence[str]
    outputs: Sequence[Path]
    inputs: Sequence[Path] = ()
    replaced: Sequence[Path] = ()
    environment: dict[str, str] = field(default_factory=dict)
    passing: Sequence[str] = ()

    def line(self) -> str:
        """The command as one would type it."""
        words = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*words, shlex.join(self.command)])


def run_steps(steps: Sequence[Step], records: Path, programs: dict[str, str]) -> None:
    """Run the steps in order, printing each command; skip those that are done.

    A finished step leaves ``records/NAME.json`` with its command and the sizes and times of its
    inputs and outputs. It is skipped while all of that is unchanged and no step before it ran.
    ``programs`` maps the first word of a command to the program to start ("python" to this
    interpreter, say).

    Raises UserError when a command fails; what it printed says why.
    """
    with disk_errors(records):
        records.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, start=1):
        head = f"[{number}/{len(steps)}] {step.name}"
        record = records / f"{step.name}.json"
        if record.exists() and _read(record) == _state(step):
            print(f"{head}: there already\n    {step.line()}", flush=True)
            continue
        for later in steps[number - 1 :]:
            (records / f"{later.name}.json").unlink(missing_ok=True)
        for path in step.replaced:
            shutil.rmtree(path, ignore_errors=True)
        print(f"{head}\n    {step.line()}", flush=True)
        started = time.perf_counter()
        program = [programs.get(step.command[0], step.command[0]), *step.command[1:]]
        code = subprocess.call(program, env={**os.environ, **step.environment})
        if code != 0:
            raise UserError(f"{step.name} failed with exit code {code}: {step.line()}")
        missing = [str(path) for path in step.outputs if not path.exists()]
        if missing:
            raise UserError(f"{step.name} did not make {', '.join(missing)}: {step.line()}")
        write_atomic(record, json.dumps(_state(step)).encode())
        print(f"    done in {time.perf_counter() - started:.0f} s", flush=True)


def _state(step: Step) -> dict[str, Any]:
    return {
        "command": [word for word in step.command if word not in step.passing],
        "environment": step.environment,
        "inputs": {str(path): _contents(path) for path in step.inputs},
        "outputs": {str(path): _contents(path) for path in step.outputs},
    }


def _contents(path: Path) -> list[list[Any]]:
    """[name, bytes, time of last change] of a file or of every file of a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [
        [p.relative_to(path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns]
        for p in files
        if p.exists()
    ]


def _read(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def text_steps(folder: Path, patterns: list[str], workers: str) -> list[Step]:
    """Text, tokenizer and token shards; the user's text when patterns are given."""
    text, tokenizer, data = folder / "text", folder / "tokenizer", folder / "data"
    files = tuple(Path(name) for pattern in patterns for name in sorted(glob.glob(pattern)))
    if patterns and not files:
        raise UserError(f"--input {' '.join(patterns)}: no such file")
    steps = []
    if not patterns:
        gather = ["python", "tools/gather_docs.py", "--output", str(text), "--workers", workers]
        steps.append(Step("text", gather, [text / "gathered.json"]))
        patterns = [f"{text}/train-*.json.gz"]
    train_tokenizer = ["python", "tools/train_tokenizer.py", "--input", *patterns]
    train_tokenizer += ["--vocab_size", "8192", "--sample_megabytes", "5"]
    train_tokenizer += ["--output", str(tokenizer)]
    steps.append(Step("tokenizer", train_tokenizer, [tokenizer], files, replaced=[tokenizer]))

    preprocess = ["python", "tools/preprocess_c4.py", "--tokenizer", str(tokenizer)]
    preprocess += ["--workers", workers, "--input"]
    held_out = ["--validation_fraction", "0.02"] if files else []
    train = data / "train"
    command = [*preprocess, *patterns, "--output", str(train), *held_out]
    steps.append(Step("shards", command, [train], files, replaced=[train]))
    if not files:
        validation = data / "validation"
        command = [*preprocess, f"{text}/validation-*.json.gz", "--output", str(validation)]
        command += ["--split", "validation"]
        steps.append(Step("validation-shards", command, [validation], replaced=[validation]))
    return steps


def run_steps_of_both(folder: Path, own_text: bool, overrides: list[str]) -> list[Step]:
    """The same training without and with restarts; settings of restarts are for the second."""
    plain = [word for word in overrides if not word.startswith("restarts.")]
    return [
        run_step(folder, "plain", own_text, plain),
        run_step(folder, "restarts", own_text, [*RESTARTS, *overrides]),
    ]


def run_step(folder: Path, name: str, own_text: bool, overrides: list[str]) -> Step:
    """Training in two processes, on two GPUs where there are any; one on a single GPU."""
    import torch

    run = folder / "runs" / name
    gpus = torch.cuda.device_count()
    ranks = 1 if gpus == 1 else 2
    port = ["--master_port", str(free_port())]
    command = ["deepspeed", "--num_gpus", str(ranks), *port, "launchers/pretrain.py"]
    command += ["--config", "recipes/quickstart.yaml"]
    command += ["--deepspeed_config", "ds_configs/zero2.json"]
    command += [f"run.dir={run}", f"data.train={folder}/data/train"]
    command += [f"data.validation={'null' if own_text else f'{folder}/data/validation'}"]
    environment = {}
    if gpus:
        command += ["train.precision=bf16"]
    else:
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    return Step(
        f"training-{name}",
        command + overrides,
        [run / "metrics.jsonl"],
        environment=environment,
        passing=port,
    )


def free_port() -> int:
    """DeepSpeed's usual port for the ranks to meet, or another one when that is taken."""
    for port in (29500, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UserError("no free port of the loopback interface for the ranks to meet")


def result_steps(folder: Path) -> list[Step]:
    """The curves of both runs as a picture, a page with everything; the second as a folder."""
    runs, model = folder / "runs", folder / "model"
    steps = [
        Step(
            name,
            ["python", "tools/report.py", str(runs), "--output", str(folder / output)],
            [folder / output],
        )
        for name, output in (("curve", "curve.png"), ("report", "report.html"))
    ]
    export = ["python", "tools/export_hf.py", str(runs / "restarts"), "--output", str(model)]
    return [
        *steps,
        Step("export", [*export, "--form", "factorized"], [model], replaced=[model]),
    ]


def continued(model: Path, prompt: str, tokens: int = 40) -> str:
    """``prompt`` and what the exported model makes of it, drawn at temperature 0.7."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import megalr.hf.auto  # noqa: F401  (the classes of factorized folders)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt").input_ids  # (1, S)
    network = AutoModelForCausalLM.from_pretrained(model)
    drawn = network.generate(ids, max_new_tokens=tokens, do_sample=True, temperature=0.7)
    return " ".join(tokenizer.decode(drawn[0], skip_special_tokens=True).split())


def separate_overrides(arguments: argparse.Namespace) -> argparse.Namespace:
    """Move ``section.key=value`` after ``--input`` to the overrides, unless it is a file."""
    words = arguments.input
    taken = [w for w in words if OVERRIDE.match(w) and not (os.path.lexists(w) or glob.glob(w))]
    arguments.input = [word for word in words if word not in taken]
    arguments.overrides = [*arguments.overrides, *taken]
    if words and not arguments.input:
        raise UserError(f"--input {' '.join(words)}: names no file before the settings")
    return arguments


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line ``words``, or this program's own."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input", nargs="+", default=[], help="your own text, as for tools/preprocess_c4.py"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="for all results (default: quickstart, with --input quickstart/own)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    words = sys.argv[1:] if words is None else words
    arguments = separate_overrides(parse(parser, words, {"--folder": "--output"}))
    arguments.overrides = in_order(arguments.overrides, words)
    return arguments


def main() -> None:
    """Run the steps, compare the runs, say where everything is."""
    arguments = parse_arguments()
    started = time.perf_counter()
    folder = arguments.output or Path("quickstart/own" if arguments.input else "quickstart")
    own_text = bool(arguments.input)
    steps = text_steps(folder, arguments.input, str(os.cpu_count() or 1))
    steps += run_steps_of_both(folder, own_text, arguments.overrides)
    steps += result_steps(folder)
    programs = {
        "python": sys.executable,
        "deepspeed": str(Path(sys.executable).parent / "deepspeed"),
    }
    run_steps(steps, folder / "steps", programs)
    runs = folder / "runs"
    print(
        f"\nwithout restarts: {perplexity_change(read_run(runs / 'plain'))}\n"
        f"with restarts:    {perplexity_change(read_run(runs / 'restarts'))}\n"
        f"sample: {continued(folder / 'model', PROMPT)}\n\n"
        f"({time.perf_counter() - started:.0f} s)\n"
        f"  curves     {folder / 'curve.png'}\n"
        f"  report     {folder / 'report.html'}\n"
        f"  runs       {runs} (config.yaml, metrics.jsonl, checkpoints/, tensorboard/)\n"
        f"  model      {folder / 'model'} (factorized, for transformers)\n"
        f"  tokenizer  {folder / 'tokenizer'}\n"
        f"  shards     {folder / 'data'}"
    )


if __name__ == "__main__":
    exit_cleanly(main)
