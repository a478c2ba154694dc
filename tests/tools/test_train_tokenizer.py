"""tools/train_tokenizer.py as a command."""

from __future__ import annotations

import os
from pathlib import Path

from megalr.preprocessing.tokenizer import open_tokenizer
from tests.preprocessing.corpus import prose, run_tool, write_jsonl


def test_the_command_writes_a_folder_that_opens_and_explains_mistakes(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.json.gz", prose(1500))
    base = ["--input", tmp_path / "*.json.gz", "--output", tmp_path / "tokenizer", "--threads", 1]
    done = run_tool("train_tokenizer", *base, "--vocab_size", 400)
    assert "400 ids, trained on 1,500 documents" in done.stdout
    assert open_tokenizer(tmp_path / "tokenizer").vocab_size == 400
    for arguments, message in [
        ([*base, "--vocab_size", 400], "exists and is not empty"),
        (["--input", "none", "--output", tmp_path / "x", "--vocab_size", 400], "no such input"),
    ]:
        failed = run_tool("train_tokenizer", *arguments, check=False)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ") and message in failed.stderr


def test_the_number_of_cores_changes_nothing(tmp_path: Path) -> None:
    """They decided the number of threads once, and with it the order in which sums are rounded."""
    write_jsonl(tmp_path / "a.json.gz", prose(1500))
    cores = os.sched_getaffinity(0)
    try:
        for name, allowed in [("few", {min(cores)}), ("all", cores)]:
            os.sched_setaffinity(0, allowed)  # the command inherits it
            run_tool(
                "train_tokenizer",
                *("--input", tmp_path / "a.json.gz", "--output", tmp_path / name),
                *("--vocab_size", 400),
            )
    finally:
        os.sched_setaffinity(0, cores)
    few, every = (open_tokenizer(tmp_path / name).fingerprint for name in ("few", "all"))
    assert few == every
