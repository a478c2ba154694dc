"""Speed and memory of preprocessing, beside the rates it is to be compared with.

    python benchmarks/preprocessing.py --input 'corpus/train-*.json.gz' --tokenizer spiece.model

Measured one after the other in one run:
* bare: SentencePiece alone on documents that are in memory, one core, the best of --repeats;
* loop: ``for text in documents: tokenizer(text)["input_ids"]`` with the Hugging Face tokenizer,
  what Megatron's tool amounts to;
* end to end: tools/preprocess_c4.py, gzip in to shards and manifest out, on one worker and on two;
* memory: peak resident size of the tool on 10,000 and on 1,000,000 documents.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import ROOT, provenance, save

from megalr.errors import exit_cleanly
from megalr.preprocessing.tokenizer import open_tokenizer
from megalr.readers.documents import DocumentReader, ReadOptions
from megalr.readers.input_splits import plan_splits

SMALL, LARGE = 10_000, 1_000_000  # documents of the memory measurement


def sample_documents(inputs: list[str], count: int) -> list[str]:
    parts = plan_splits(inputs, 1 << 30).values()
    texts = (
        text for part in parts for batch in DocumentReader(part, ReadOptions()) for text in batch
    )
    return list(itertools.islice(texts, count))


def rate(function: Callable[[], int], repeats: int) -> dict[str, Any]:
    """Tokens a second of CPU time and of wall time: the best and the median of the repeats."""
    cpu, wall, tokens = [], [], 0
    for _ in range(repeats):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        tokens = function()
        cpu.append(tokens / (time.process_time() - cpu_start))
        wall.append(tokens / (time.perf_counter() - wall_start))
    return {
        "tokens": tokens,
        "tokens_per_second": round(max(wall)),
        "median_tokens_per_second": round(statistics.median(wall)),
        "tokens_per_cpu_second": round(max(cpu)),
    }


def bare(tokenizer: Path, texts: list[str], repeats: int) -> dict[str, Any]:
    import sentencepiece

    path = open_tokenizer(tokenizer).path
    model = sentencepiece.SentencePieceProcessor(model_file=str(path), num_threads=1)
    return rate(lambda: sum(len(model.encode(text)) for text in texts), repeats)


def loop(tokenizer: Path, texts: list[str], repeats: int) -> dict[str, Any]:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        open_tokenizer(tokenizer).copy_to(Path(folder))
        model = AutoTokenizer.from_pretrained(folder)
        return rate(lambda: sum(len(model(text)["input_ids"]) for text in texts), repeats)


def run_tool(
    inputs: list[str], tokenizer: Path, output: Path, workers: int
) -> tuple[dict[str, Any], float, float]:
    """Summary of the tool, CPU seconds of its processes, peak resident MiB of the first."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess_c4.py"), "--input", *inputs]
    command += ["--tokenizer", str(tokenizer), "--output", str(output), "--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    peak = 0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, env=environment)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            peak = max(peak, high_water_kib(process.pid))
            time.sleep(0.1)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(text), usage.ru_utime + usage.ru_stime, peak / 1024


def high_water_kib(pid: int) -> int:
    """Peak resident size of a process so far (ru_maxrss would count this process before exec)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def end_to_end(
    inputs: list[str], tokenizer: Path, workers: int, repeats: int, work: Path
) -> dict[str, Any]:
    rates, cpu_rates, summary = [], [], {}
    for number in range(repeats):
        output = work / f"workers{workers}-{number}"
        summary, cpu, _ = run_tool(inputs, tokenizer, output, workers)
        rates.append(summary["tokens_per_second"])
        cpu_rates.append(summary["tokens"] / cpu)
        subprocess.run(["rm", "-r", str(output)], check=True)
    return {
        "workers": workers,
        "tokens": summary["tokens"],
        "tokens_per_second": max(rates),
        "median_tokens_per_second": round(statistics.median(rates)),
        "tokens_per_cpu_second": round(max(cpu_rates)),  # start of Python included
    }


def memory(texts: list[str], tokenizer: Path, work: Path) -> dict[str, Any]:
    """Peak resident size on many and on few documents of the same 300 characters' length."""
    peaks = {}
    for count in (SMALL, LARGE):
        path = work / f"{count}.json.gz"
        with gzip.open(path, "wt", compresslevel=1) as stream:
            for text in itertools.islice(itertools.cycle(texts), count):
                stream.write(json.dumps({"text": text[:300]}) + "\n")
        _, _, peak = run_tool([str(path)], tokenizer, work / f"memory{count}", 1)
        peaks[f"peak_mib_{count}_documents"] = round(peak, 1)
        path.unlink()
    return peaks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True, help="C4-format files or patterns")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=6000, help="for bare and loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip_memory", action="store_true")
    parser.add_argument("--name", default="preprocessing", help="of the result file")
    args = parser.parse_args()
    result = provenance(("sentencepiece", "transformers", "tokenizers", "numpy"))
    texts = sample_documents(args.input, args.documents)
    result["bare"] = bare(args.tokenizer, texts, args.repeats)
    result["loop"] = loop(args.tokenizer, texts, 1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        one = end_to_end(args.input, args.tokenizer, 1, args.repeats, work)
        two = end_to_end(args.input, args.tokenizer, 2, args.repeats, work)
        if not args.skip_memory:
            result["memory"] = memory(texts, args.tokenizer, work)
    result["one_worker"], result["two_workers"] = one, two
    result["of_bare"] = round(one["tokens_per_second"] / result["bare"]["tokens_per_second"], 3)
    result["of_loop"] = round(one["tokens_per_second"] / result["loop"]["tokens_per_second"], 2)
    result["two_over_one"] = round(two["tokens_per_second"] / one["tokens_per_second"], 3)
    save(args.name, result)
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
