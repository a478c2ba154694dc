"""Names of input splits and their shards; folders as input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalr.errors import UserError
from megalr.readers.input_splits import plan_splits
from tests.preprocessing.corpus import prose, write_jsonl


def test_a_file_named_like_a_split_of_another_gets_a_name_of_its_own(tmp_path: Path) -> None:
    large = write_jsonl(tmp_path / "a.jsonl", prose(60))
    third = -(-large.stat().st_size // 3)
    names = [f"a-part-{number:05d}-of-00003" for number in range(3)]
    write_jsonl(tmp_path / f"{names[0]}.jsonl", prose(2))
    plan = plan_splits([str(tmp_path / "*.jsonl")], third)
    assert len(plan) == 4
    assert len({split.file for split in plan.values()}) == 2
    assert set(plan_splits([str(large)], third)) == set(names)  # unchanged where nothing collides


def test_the_validation_shard_of_one_file_is_never_the_shard_of_another(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.validation.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, prose(2))
    inputs = [str(tmp_path / "*.jsonl")]
    assert set(plan_splits(inputs, 1 << 30)) == {"a", "a.validation", "b"}
    names = list(plan_splits(inputs, 1 << 30, ["", ".validation"]))
    shards = [name + suffix for name in names for suffix in ("", ".validation")]
    assert len(set(shards)) == 6 and "b" in names


def test_names_of_any_length_that_the_system_takes_become_names_that_it_takes(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / (letter * 249 + ".jsonl") for letter in "ab"]  # 255 bytes
    paths.append(tmp_path / ("c" * 240 + ".jsonl"))
    for path in paths:
        write_jsonl(path, prose(20))
    plan = plan_splits([str(path) for path in paths], 200)
    assert max(map(len, plan)) == 240
    assert len(plan) == sum(-(-path.stat().st_size // 200) for path in paths)
    assert set(plan_splits([str(paths[2])], 1 << 30)) == {"c" * 240}


def test_a_folder_is_its_files_of_one_kind(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "data" / "a.jsonl.gz", prose(2))
    second = write_jsonl(tmp_path / "data" / "sub" / "b.jsonl", prose(2))
    write_jsonl(tmp_path / "data" / ".hidden" / "c.jsonl", prose(2))
    (tmp_path / "data" / "README.md").write_text("x")
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    plan = plan_splits([str(tmp_path / "data")], 1 << 30)
    assert [split.file for split in plan.values()] == [first, second]
    (tmp_path / "data" / "d.txt").write_text("x\n")
    with pytest.raises(UserError, match=r"data: .* several kinds of files \(2 json, 1 text\)"):
        plan_splits([str(tmp_path / "data")], 1 << 30)


def test_a_folder_with_several_splits_is_not_mixed(tmp_path: Path) -> None:
    for name in ("train-00000.jsonl", "test-00000.jsonl"):
        write_jsonl(tmp_path / "data" / name, prose(2))
    with pytest.raises(UserError, match=r"several splits \(test, train\); give .*\*test\*"):
        plan_splits([str(tmp_path)], 1 << 30)


def test_folders_of_save_to_disk_are_their_arrow_files_in_order(tmp_path: Path) -> None:
    import datasets

    from megalr.readers.documents import DocumentReader, ReadOptions

    def texts(folder: Path) -> list[str]:
        plan = plan_splits([str(folder)], 1 << 30)
        return [
            text
            for split in plan.values()
            for batch in DocumentReader(split, ReadOptions())
            for text in batch
        ]

    data = datasets.Dataset.from_dict({"text": prose(50)})
    data.save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert texts(tmp_path / "one") == prose(50)
    both = datasets.DatasetDict({"train": data, "test": data.select(range(5))})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"holds the splits \['train', 'test'\]; name one"):
        plan_splits([str(tmp_path / "both")], 1 << 30)
    assert texts(tmp_path / "both" / "test") == prose(50)[:5]
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../both/train/data-00000-of-00001.arrow"
    (tmp_path / "one" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="which is not in the folder"):
        plan_splits([str(tmp_path / "one")], 1 << 30)
