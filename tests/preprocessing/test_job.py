"""The preprocessing job: what it writes, what it refuses, and starting it again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megalr.data import open_training_data, open_validation_data
from megalr.data.manifest import load_manifest
from megalr.data.megatron_index import IndexedShard
from megalr.errors import UserError
from megalr.file_lock import JobLock
from megalr.files import HashingWriter
from megalr.preprocessing.job import PreprocessJob, Summary, run_local
from megalr.preprocessing.split_worker import WorkSettings
from megalr.preprocessing.tokenizer import open_tokenizer
from megalr.readers.documents import ReadOptions
from tests.preprocessing.corpus import (
    TOOLS,
    prose,
    run_tool,
    tiny_tokenizer,
    tool_environment,
    write_jsonl,
)


def preprocess(
    inputs: list[Path],
    output: Path,
    workers: int = 1,
    split_bytes: int = 1 << 30,
    **settings: object,
) -> Summary:
    chosen = {"tokenizer": tiny_tokenizer(), **settings}
    job = PreprocessJob([str(p) for p in inputs], WorkSettings(output, **chosen), split_bytes)  # type: ignore[arg-type]
    return run_local(job, workers)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a data set but the lock and the summary, which holds times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith((".lock", "summary"))
    }


def documents_of(prefix: Path) -> list[list[int]]:
    shard = IndexedShard(prefix)
    return [shard.document(i).tolist() for i in range(shard.num_documents)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return [
        write_jsonl(folder / f"c4-train.{n:05d}-of-00003.json.gz", prose(80 + 40 * n, seed=n))
        for n in range(3)
    ]


@pytest.fixture(scope="module")
def finished(inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "data"
    preprocess(inputs, output)
    return output


def test_every_document_is_tokenized_ends_in_eos_and_keeps_its_place(
    inputs: list[Path], finished: Path
) -> None:
    tokenizer = open_tokenizer(tiny_tokenizer())
    for number, path in enumerate(inputs):
        texts = prose(80 + 40 * number, seed=number)
        found = documents_of(finished / path.name.removesuffix(".json.gz"))
        assert found == [tokenizer.encode([text], True)[0].tolist() for text in texts]
    manifest = load_manifest(finished)
    assert [shard.documents for shard in manifest.shards] == [80, 120, 160]
    assert manifest.totals()["train"]["tokens"] == sum(s.tokens for s in manifest.shards)
    text_bytes = sum(len(text.encode()) for n in range(3) for text in prose(80 + 40 * n, seed=n))
    assert sum(shard.text_bytes for shard in manifest.shards) == text_bytes
    assert open_training_data(finished, sequence_length=32).num_documents == 360
    assert not list(finished.rglob("*.partial"))


def test_the_manifest_holds_the_checksums_that_sha256sum_gives(
    inputs: list[Path], finished: Path
) -> None:
    for shard, source in zip(load_manifest(finished).shards, inputs, strict=True):
        files = [finished / f"{shard.name}.bin", finished / f"{shard.name}.idx", source]
        done = subprocess.run(["sha256sum", *map(str, files)], capture_output=True, text=True)
        sums = [line.split()[0] for line in done.stdout.splitlines()]
        assert sums == [shard.bin_sha256, shard.idx_sha256, shard.source.sha256]
        assert shard.source.bytes == source.stat().st_size


def test_any_number_of_workers_writes_the_same_bytes(
    inputs: list[Path], finished: Path, tmp_path: Path
) -> None:
    summary = preprocess(list(reversed(inputs)), tmp_path / "data", workers=2)
    assert contents(tmp_path / "data") == contents(finished)
    assert summary.complete and summary.files == 3 and summary.documents == 360


def test_starting_again_keeps_what_is_intact_and_redoes_what_is_damaged(
    inputs: list[Path], finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "data"
    shutil.copytree(finished, output)
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.bin")}
    names = [path.name.removesuffix(".json.gz") for path in inputs]
    content = bytearray((output / f"{names[1]}.bin").read_bytes())
    content[100] ^= 1  # same size: only the checksum tells
    (output / f"{names[1]}.bin").write_bytes(bytes(content))
    (output / f".{names[2]}.bin.0-of-1.0badcafe.partial").write_bytes(b"half")
    summary = preprocess(inputs, output)
    assert summary.reused == 2
    assert contents(output) == contents(finished)
    assert (output / f"{names[0]}.bin").stat().st_mtime_ns == before[output / f"{names[0]}.bin"]
    (output / "finished" / f"{names[0]}.json").write_text('{"settings": {}')
    (output / f"{names[2]}.idx").unlink()
    assert preprocess(inputs, output).reused == 1
    assert contents(output) == contents(finished)


def test_other_settings_or_inputs_in_the_same_folder_are_refused(
    inputs: list[Path], finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "data"
    shutil.copytree(finished, output)
    with pytest.raises(UserError, match=r"job\.json: .*append_eos = True, now it is False"):
        preprocess(inputs, output, append_eos=False)
    with pytest.raises(UserError, match=r"does not name \(c4-train\.00002-of-00003 and 0 more\)"):
        preprocess(inputs[:2], output)
    assert contents(output) == contents(finished)


def test_validation_documents_are_chosen_by_their_hash(tmp_path: Path) -> None:
    texts = prose(400, seed=5)
    one = write_jsonl(tmp_path / "one.jsonl", texts)
    two = write_jsonl(tmp_path / "two.jsonl", list(reversed(texts)))
    preprocess([one, two], tmp_path / "data", validation_fraction=0.2)
    held = documents_of(tmp_path / "data" / "one.validation")
    kept = documents_of(tmp_path / "data" / "one")
    assert 50 < len(held) < 110 and len(held) + len(kept) == 400
    tokenizer = open_tokenizer(tiny_tokenizer())
    rows = [tokenizer.encode([text], True)[0].tolist() for text in texts]
    assert [row for row in rows if row in held] == held
    assert documents_of(tmp_path / "data" / "two.validation") == list(reversed(held))
    assert open_training_data(tmp_path / "data", sequence_length=8).num_documents == 2 * len(kept)
    assert open_validation_data(tmp_path / "data", sequence_length=8).num_documents == 2 * len(held)


def test_a_fraction_that_holds_out_no_document_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", prose(5, seed=5))
    preprocess([path], tmp_path / "data", validation_fraction=1e-9)
    told = "warning: --validation_fraction 1e-09 leaves no validation document among 5"
    assert told in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no validation sample .*larger --validation_fraction"):
        open_validation_data(tmp_path / "data", sequence_length=8)
    preprocess([path], tmp_path / "all", validation_fraction=1 - 1e-9)
    assert "leaves no train document among 5" in capsys.readouterr().err
    preprocess([path], tmp_path / "both", validation_fraction=0.5)
    assert "warning" not in capsys.readouterr().err


def test_the_parts_of_one_large_file_together_hold_all_documents(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "big.jsonl", prose(200))
    preprocess([path], tmp_path / "whole")
    preprocess([path], tmp_path / "parts", workers=2, split_bytes=10_000)
    manifest = load_manifest(tmp_path / "parts")
    assert len(manifest.shards) > 3
    found = [d for s in manifest.shards for d in documents_of(tmp_path / "parts" / s.name)]
    assert found == documents_of(tmp_path / "whole" / "big")


@pytest.mark.long
def test_documents_of_fifty_megabytes_and_empty_ones_pass(tmp_path: Path) -> None:
    text = " ".join(prose(50))
    huge = (text * (50_000_000 // len(text.encode()) + 1))[:50_000_000]
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "", huge, "  ", "b"])
    summary = preprocess([path], tmp_path / "data")
    assert (summary.documents, summary.empty_documents) == (3, 2)
    shard = IndexedShard(tmp_path / "data" / "a")
    assert shard.num_documents == 3
    ids = shard.document(1)
    tokenizer = open_tokenizer(tiny_tokenizer())
    head, tail = (tokenizer.encode([part], True)[0] for part in (huge[:5000], huge[-5000:]))
    assert np.array_equal(ids[:1000], head[:1000])
    assert np.array_equal(ids[-1000:], tail[-1000:])


def test_a_truncated_input_is_named_and_the_others_are_finished(
    inputs: list[Path], finished: Path, tmp_path: Path
) -> None:
    copies = [Path(shutil.copy(path, tmp_path)) for path in inputs]
    content = copies[1].read_bytes()
    copies[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"1 of 3 inputs failed: .*00001.* truncated.* 2 are fin"):
        preprocess(copies, tmp_path / "data", workers=2)
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert not list((tmp_path / "data").glob("*00001*"))
    assert not list((tmp_path / "data").rglob("*.partial"))
    copies[1].write_bytes(content)
    assert preprocess(copies, tmp_path / "data").reused == 2
    names = [f"{path.name.removesuffix('.json.gz')}.bin" for path in inputs]
    for name in names:
        assert (tmp_path / "data" / name).read_bytes() == (finished / name).read_bytes()


def test_inputs_without_any_document_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="the inputs hold no document"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "data")


def test_bad_lines_are_reported_and_recorded(tmp_path: Path, capsys) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", prose(95), [b"{broken"] * 5)
    reading = ReadOptions(max_bad_lines=0.06)
    summary = preprocess([path], tmp_path / "data", reading=reading)
    assert summary.bad_lines == 5 and summary.documents == 95
    assert "a.jsonl: skipped 5 bad of 100 records: line 1: invalid JSON" in capsys.readouterr().err
    assert load_manifest(tmp_path / "data").shards[0].bad_lines == 5
    with pytest.raises(UserError, match="5 of 100 records are bad"):
        preprocess([path], tmp_path / "other")


def test_a_full_disk_stops_the_job_and_nothing_unfinished_counts(
    inputs: list[Path], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = HashingWriter.write
    left = [40_000]

    def write(self: HashingWriter, data: bytes) -> None:
        left[0] -= len(data)
        if left[0] < 0:
            from megalr.files import disk_errors

            with disk_errors(self.path):
                raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, data)

    monkeypatch.setattr(HashingWriter, "write", write)
    with pytest.raises(UserError, match=r"\.(bin|idx): no space left on the disk"):
        preprocess(inputs, tmp_path / "data")
    monkeypatch.undo()
    assert not list((tmp_path / "data").rglob("*.partial"))
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert len(list((tmp_path / "data" / "finished").iterdir())) < 3
    preprocess(inputs, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(finished)


def test_a_second_job_on_the_same_folder_stops_with_the_name_of_the_first(
    inputs: list[Path], finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "data"
    shutil.copytree(finished, output)
    code = (
        "import sys, time, pathlib; from megalr.file_lock import JobLock\n"
        "lock = JobLock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, env=tool_environment()
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"another job is writing here: process {holder.pid} "):
            preprocess(inputs, output)
        with pytest.raises(UserError, match=rf"process {holder.pid} "):
            JobLock(output, share=1, shares=4)  # another division of the work
    finally:
        holder.kill()  # the system gives the lock up
        holder.wait()
    assert preprocess(inputs, output).reused == 3


def test_shares_of_one_job_run_side_by_side_and_the_last_writes_the_manifest(
    inputs: list[Path], finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "data"
    settings = WorkSettings(output, tiny_tokenizer())
    summaries = []
    for share in (1, 0):
        job = PreprocessJob([str(path) for path in inputs], settings, 1 << 30, share, 2)
        summaries.append(run_local(job, 1))
    assert [s.complete for s in summaries] == [False, True]
    assert [s.files for s in summaries] == [1, 2]
    assert contents(output) == contents(finished)


def _start(output: Path, inputs: list[Path], workers: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOOLS / "preprocess_c4.py"), "--input", *map(str, inputs)]
    command += ["--tokenizer", str(tiny_tokenizer()), "--output", str(output)]
    return subprocess.Popen(
        [*command, "--workers", str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=tool_environment(),
    )


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_a_killed_worker_ends_the_job_with_a_message_and_the_next_start_completes_it(
    tmp_path: Path,
) -> None:
    inputs = [write_jsonl(tmp_path / f"{n}.jsonl", prose(200, seed=n) * 100) for n in range(2)]
    output = tmp_path / "data"
    job = _start(output, inputs, workers=2)
    while len(list(output.glob(".*.bin.*"))) < 2:  # both workers write
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    workers = [
        pid
        for pid in _children(job.pid)
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(workers[0], signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"error: worker process {workers[0]} died with signal 9 (SIGKILL)")
    assert ".jsonl; what is finished is kept" in last
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    job = _start(output, inputs, workers=2)
    out, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert json.loads(out)["complete"]
    preprocess(inputs, tmp_path / "expected")
    assert contents(output) == contents(tmp_path / "expected")


def test_workers_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    inputs = [write_jsonl(tmp_path / f"{n}.jsonl", prose(200, seed=n) * 100) for n in range(2)]
    output = tmp_path / "data"
    job = _start(output, inputs, workers=2)
    while len(list(output.glob(".*.bin.*"))) < 2:
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    workers = _children(job.pid)
    job.kill()
    job.communicate()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def test_the_command_line_prints_the_summary_and_one_line_for_a_mistake(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.json.gz", prose(50))
    base = ["--input", path, "--tokenizer", tiny_tokenizer(), "--output", tmp_path / "data"]
    summary = json.loads(run_tool("preprocess_c4", *base).stdout)
    assert summary["documents"] == 50 and summary["complete"]
    assert json.loads((tmp_path / "data" / "summary.json").read_text()) == summary
    data = open_training_data(tmp_path / "data", sequence_length=16)
    assert (data.read(np.arange(data.num_samples))[0] < data.vocab_size).all()
    for wrong, message in [
        (["--share", "4/4"], "--share is '4/4'"),
        (["--workers", "0"], "--workers and --part_megabytes must be at least 1"),
        (["--max_bad_lines", "nan"], "--max_bad_lines is nan"),
        (["--validation_fraction", "1"], "--validation_fraction is 1.0"),
        (["--input", "nothing*.gz"], "nothing*.gz: no such input file"),
    ]:
        failed = run_tool("preprocess_c4", *base, *wrong, check=False)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ") and message in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", prose(5))
    (tmp_path / "file").write_text("precious")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file where a folder is needed"):
            preprocess([path], output)


def test_no_document_is_lost_when_names_collide(tmp_path: Path) -> None:
    large = write_jsonl(tmp_path / "a.jsonl", prose(300))
    small = write_jsonl(tmp_path / "a-part-00000-of-00003.jsonl", prose(50, seed=1))
    summary = preprocess(
        [large, small], tmp_path / "data", split_bytes=-(-large.stat().st_size // 3)
    )
    manifest = load_manifest(tmp_path / "data")
    assert summary.documents == 350
    assert manifest.totals()["train"]["documents"] == 350
    texts = {text for n in (0, 1) for text in prose(300 if n == 0 else 50, seed=n)}
    tokenizer = open_tokenizer(tiny_tokenizer())
    found = {
        tokenizer.decode(ids[:-1])
        for shard in manifest.shards
        for ids in documents_of(tmp_path / "data" / shard.name)
    }
    assert found == texts


def test_settings_may_change_until_something_is_finished(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": prose(20), "n": [1] * 20}), path)
    with pytest.raises(UserError, match=r"no column 'text', it has \['body', 'n'\].*--text_key"):
        preprocess([path], tmp_path / "data")
    summary = preprocess([path], tmp_path / "data", reading=ReadOptions(text_key="body"))
    assert summary.documents == 20
    preprocess([path], tmp_path / "fresh", reading=ReadOptions(text_key="body"))
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")
    with pytest.raises(UserError, match="was started with text_key = 'body', now it is 'text'"):
        preprocess([path], tmp_path / "data")


@pytest.mark.parametrize("workers", [1, 2])
def test_names_of_240_characters_are_preprocessed(tmp_path: Path, workers: int) -> None:
    inputs = [write_jsonl(tmp_path / f"{letter * 234}.jsonl", prose(20)) for letter in "ab"]
    inputs.append(write_jsonl(tmp_path / f"{'c' * 249}.jsonl", prose(20)))
    output = tmp_path / "data"
    assert preprocess(inputs, output, workers, validation_fraction=0.2).documents == 60
    assert len(list(output.glob("*.validation.idx"))) == 3
    assert not list(output.rglob("*.partial"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG])
def test_every_error_of_the_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", prose(20))

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("os.fsync", "os.replace", "os.write"):
        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            with pytest.raises(UserError, match=str(tmp_path / "data")) as caught:
                preprocess([path], tmp_path / "data")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "data" / "manifest.json").exists()
    assert preprocess([path], tmp_path / "data").documents == 20


def test_a_record_that_loses_documents_is_not_taken(
    inputs: list[Path], finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "data"
    shutil.copytree(finished, output)
    (output / "manifest.json").unlink()
    record = sorted((output / "finished").iterdir())[0]
    content = json.loads(record.read_text())
    del content["sha256"]  # as older versions wrote it
    record.write_text(json.dumps(content))
    assert preprocess(inputs, output).reused == 3
    content["report"]["records"] += 1
    record.write_text(json.dumps(content))
    (output / "manifest.json").unlink()
    assert preprocess(inputs, output).reused == 2  # the doubtful one was read again
    assert contents(output) == contents(finished)
