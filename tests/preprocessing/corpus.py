"""Generated prose and a tiny tokenizer trained on it, so that tests need no files of their own."""

from __future__ import annotations

import atexit
import functools
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalr.preprocessing.tokenizer_training import train_tokenizer
from megalr.readers.documents import ReadOptions

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
VOCAB_SIZE = 500


def prose(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """``count`` documents of invented words in sentences; a few hold accents and line breaks."""
    random = np.random.default_rng(seed)
    syllables = ["ka", "lo", "mi", "ten", "ra", "su", "vor", "é", "ing", "the", "pa", "ño"]
    words = ["".join(random.choice(syllables, random.integers(1, 4))) for _ in range(300)]
    words[5] = "</kas>"
    frequency = 1 / np.arange(1, len(words) + 1)
    frequency /= frequency.sum()
    result = []
    for _ in range(count):
        chosen = random.choice(words, random.integers(3, longest), p=frequency)
        separator = "\n" if random.random() < 0.1 else " "
        result.append(separator.join(chosen).capitalize() + ".")
    return result


def write_jsonl(path: Path, texts: Sequence[str], extra: Sequence[bytes] = ()) -> Path:
    """C4's format, gzipped if the name ends in .gz; ``extra`` lines are spread among the rest."""
    lines = [json.dumps({"text": text, "url": "x"}).encode() for text in texts]
    for number, line in enumerate(extra):
        lines.insert(number * (len(lines) // max(len(extra), 1)), line)
    content = b"".join(line + b"\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


@functools.cache
def tiny_tokenizer() -> Path:
    """Folder of a SentencePiece tokenizer with 500 ids; trained once per test process."""
    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_jsonl(folder / "text.jsonl", prose(2000, seed=99))
    output = folder / "tokenizer"
    train_tokenizer([str(folder / "text.jsonl")], output, VOCAB_SIZE, ReadOptions())
    return output


def run_tool(name: str, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run tools/NAME.py as a user would; asserts exit code 0 if ``check``."""
    done = subprocess.run(
        [sys.executable, str(TOOLS / f"{name}.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=tool_environment(),
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def tool_environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
