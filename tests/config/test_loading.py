"""Files and overrides become one checked configuration; every mistake is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalr.config import (
    ABSENT,
    diff_configs,
    differences_that_forbid_resume,
    dump_config,
    load_run_config,
)
from megalr.errors import UserError

MINIMAL = """
run: {dir: runs/x}
model: {preset: llama_60m}
method: {name: low_rank, rank: 128}
optimizer: {lr: 1e-3}
data: {train: data/c4}
train: {updates: 100, global_batch_size: 512, micro_batch_size: 128}
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(files: list[Path], overrides: list[str], presets: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_run_config(files, overrides, presets)
    return str(caught.value)


def test_defaults_and_yaml_1_2_scalars(tmp_path: Path) -> None:
    config = load_run_config([write(tmp_path, MINIMAL)], ["train.updates=20_000", "run.seed=010"])
    assert config.optimizer.lr == 0.001  # YAML 1.1 reads 1e-3 as text
    assert config.run.seed == 10  # and 010 as eight
    assert config.train.updates == 20000
    assert config.method.name == "low_rank" and config.method.rank == 128
    assert config.method.targets == ("q", "k", "v", "o", "gate", "up", "down")
    assert config.schedule.name == "cosine" and config.schedule.min_lr_ratio == 0.1
    assert [source.path for source in config.data.train] == ["data/c4"]
    assert config.data.validation is None and config.evaluation.every == 1000


def test_dump_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    overrides = [
        "schedule={name: constant, warmup_updates: 5}",
        "data.train=[{path: a, weight: 2}, {path: b, weight: 0.5}]",
        "data.validation=[v, w]",
        "optimizer.betas=[0.9, 0.95]",
        "log.wandb_project='off'",
        "run.dir='007'",
    ]
    config = load_run_config([write(tmp_path, MINIMAL)], overrides)
    assert config.log.wandb_project == "off" and config.run.dir == "007"
    again = load_run_config([write(tmp_path, dump_config(config), "dumped.yaml")])
    assert again == config
    assert again.schedule.min_lr_ratio == 1.0


def test_all_problems_come_together_with_place_value_and_nearest_key(tmp_path: Path) -> None:
    text = MINIMAL.replace("updates: 100", "updatess: 100").replace("rank: 128", "rnk: 128")
    path = write(tmp_path, text)
    message = problems_of(
        [path],
        [
            "method.targets=[q, z]",
            "optimizer.lr=fast",
            "train.lr=3",
            "train.global_batch_size=500",
            "train.precision=bf17",
            "data.train=[{pth: a}]",
            "lg.every=1",
            "log=3",
            "run.seed=true",
            "run.timeout_seconds=1e30",
            "model.preset=llama_61m",
        ],
        presets=["llama_9m", "llama_60m"],
    )
    lines = message.splitlines()
    expected = [
        (f"{path}:7: train.updatess = 100: unknown key; did you mean train.updates?"),
        "train.updates: required, but not given",
        (f"{path}:4: method.rnk = 128: unknown key; did you mean method.rank?"),
        "method.rank: required, but not given",
        ("command line: method.targets.1 = 'z': must be one of q, k, v, o, gate, up, down"),
        ("command line: optimizer.lr = 'fast': must be a valid number"),
        ("command line: train.lr = 3: unknown key; did you mean optimizer.lr?"),
        ("command line: train.precision = 'bf17': must be one of bf16, paper_bf16, fp32; did you"),
        ("command line: data.train.0.path: required, but not given"),
        ("command line: data.train.0.pth = 'a': unknown key"),
        ("command line: lg = {'every': 1}: unknown key; did you mean log?"),
        ("command line: log = 3: must be a section with keys of its own"),
        ("command line: run.seed = true: must be a valid integer"),
        ("command line: run.timeout_seconds = 1e+30: must be less than or equal to 1"),
        ("command line: model.preset = 'llama_61m': must be one of llama_9m, llama_60m; did you"),
        (
            "command line: train.global_batch_size = 500: must be a multiple of micro_batch_size "
            "128; the nearest multiples: 384 or 512"
        ),
    ]
    for start in expected:
        assert sum(line.strip().startswith(start) for line in lines) == 1, (start, message)
    assert len(lines) == 1 + len(expected), message


def test_an_option_of_another_method_is_refused_with_the_options_of_this_one(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, MINIMAL)
    assert problems_of([path], ["method.name=full_rank"]) == (
        f"{path}:4: method.rank = 128: unknown key; (the keys of method full_rank are name)"
    )
    message = problems_of([path], ["method.name=low_rnk", "method.ranking=3"])
    assert "method.name = 'low_rnk': must be one of full_rank, low_rank" in message
    assert "did you mean low_rank?" in message
    assert "method.ranking: unknown key, whatever method.name is" in message


def test_an_empty_configuration_asks_for_every_required_key(tmp_path: Path) -> None:
    message = problems_of([write(tmp_path, "train:\n")], [])
    for key in (
        "run.dir",
        "model.preset",
        "optimizer.lr",
        "data.train",
        "train.updates",
        "train.global_batch_size",
        "train.micro_batch_size",
    ):
        assert f"{key}: required, but not given (" in message


def test_a_key_in_two_files_or_twice_in_one_names_both_places(tmp_path: Path) -> None:
    first = write(tmp_path, MINIMAL, "first.yaml")
    second = write(tmp_path, "optimizer:\n  lr: 2e-3\n  eps: 1e-6\n", "second.yaml")
    message = problems_of([first, second], [])
    assert message.startswith(f"{second}:2: optimizer.lr is also given in {first}:5;")
    assert "\n" not in message
    twice = write(tmp_path, MINIMAL + "optimizer: {lr: 1}\n", "twice.yaml")
    assert f"{twice}:8: optimizer is given twice in this file, first in line 5" in problems_of(
        [twice], []
    )
    other = write(tmp_path, "optimizer: {eps: 1e-6}\n", "other.yaml")
    assert load_run_config([first, other], ["optimizer.lr=5"]).optimizer.eps == 1e-6


def test_the_last_of_a_key_on_the_command_line_wins(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL)
    ratios = ["optimizer.lr_ratio={embedding: 2.0}", "optimizer.lr_ratio={head: 3.0}"]
    config = load_run_config([file], ["run.seed=1", "run.dir=a", *ratios, "run.seed=2"])
    assert (config.run.seed, config.run.dir) == (2, "a")
    alone = load_run_config([file], ratios[1:])
    assert config.optimizer == alone.optimizer
    # A wrong value that is replaced does no harm; one that replaces does.
    assert load_run_config([file], ["run.seed=x", "run.seed=3"]).run.seed == 3
    assert "run.seed = 'x'" in problems_of([file], ["run.seed=3", "run.seed=x"])
    switched = ["model.preset=llama_9m", "model.from_pretrained=folder", "model.preset=null"]
    assert load_run_config([file], switched).model.from_pretrained == "folder"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: [1", "not valid YAML: line 1"),
        ("- 1", "must hold sections such as `train:`"),
        ("a: &x {b: *x}", "an alias contains itself"),
        ("run: !!python/object:os.system {}", "line 1, column 6: unknown tag"),
        ("run: {dir: !!python/name:os.system }", "could not determine a constructor"),
        ("a: {b: .nan}", "a.b = nan: must be a finite number"),
        ("a: {b: [{c: .inf}, 1]}", "a.b = inf: must be a finite number"),
        ("a: {b: -1e300}", "a.b = -1e+300: must be at most 3.4e+38, the largest number in float32"),
        ("a: {b: 10000000000000000000000}", "a.b = 1e+22: must be below 2^63"),
    ],
)
def test_unreadable_files_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    message = problems_of([write(tmp_path, text)], ["run.dir=x"])
    assert said in message
    assert str(tmp_path / "run.yaml") in message


def test_missing_binary_and_malformed_input(tmp_path: Path) -> None:
    assert "cannot read the configuration: No such file" in problems_of([tmp_path / "no"], [])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff")
    assert "not UTF-8 text (byte 3)" in problems_of([binary], [])
    for override in ("updates", "=3", "train..updates=3", "train updates=3"):
        assert "must have the form section.key=value" in problems_of([], [override])
    assert "not valid YAML" in problems_of([], ["train.updates=[1"])


def test_weights_are_given_to_every_data_set_or_to_none(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_run_config([path], ["data.train=[a, {path: b}]"])
    assert [source.weight for source in config.data.train] == [None, None]
    message = problems_of([path], ["data.train={path: a, wieght: 2}"])  # one item, no list
    assert message == "data.train.0.wieght = 2: unknown key"
    message = problems_of([path], ["data.train=[a, {path: b, weight: 2}]"])
    assert message.startswith("command line: data.train = [")
    assert message.endswith("must give a weight to every item or to none")


def test_warmup_longer_than_the_run_and_impossible_accumulation(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    message = problems_of([path], ["schedule.warmup_updates=101"])
    assert message.startswith("command line: schedule.warmup_updates = 101: more warm-up updates")
    message = problems_of([path], ["train.gradient_accumulation=3"])
    assert "micro_batch_size 128 x gradient_accumulation 3 = 384" in message
    with pytest.raises(ValueError, match="warm-up"):
        config = load_run_config([path])
        type(config).model_validate({**config.model_dump(), "schedule": {"warmup_updates": 101}})


def test_a_decay_must_fit_into_the_run(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    wsd = ["schedule.name=wsd", "schedule.warmup_updates=30"]
    assert load_run_config([path], [*wsd, "schedule.decay_updates=70"]).schedule.name == "wsd"
    message = problems_of([path], [*wsd, "schedule.decay_updates=71"])
    assert message.startswith("command line: schedule.decay_updates = 71: with warmup_updates 30 ")
    assert "schedule.decay_updates: required" in problems_of([path], wsd)
    message = problems_of([path], [*wsd, "schedule.decay_updates=9", "schedule.decay_type=sqrt"])
    assert "must be one of linear, cosine, 1-sqrt" in message


def test_differences_between_runs_and_which_forbid_a_resume(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    old = load_run_config([path])
    new = load_run_config(
        [path],
        [
            "method={name: low_rank, rank: 64}",
            "log.every=1",
            "train.micro_batch_size=64",
            "evaluation.tokens=7",
        ],
    )
    assert diff_configs(old, old) == []
    assert set(diff_configs(old, new)) == {
        ("method.rank", 128, 64),
        ("log.every", 10, 1),
        ("train.micro_batch_size", 128, 64),
        ("evaluation.tokens", 10_000_000, 7),
    }
    assert differences_that_forbid_resume(old, new) == [("method.rank", 128, 64)]
    whole = write(tmp_path, MINIMAL.replace("low_rank, rank: 128", "full_rank"), "whole.yaml")
    gone = diff_configs(old, load_run_config([whole]))
    assert ("method.rank", 128, ABSENT) in gone and ("method.alpha", 32.0, ABSENT) in gone


def test_a_start_given_on_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    preset = write(tmp_path, MINIMAL)
    config = load_run_config([preset], ["model.from_pretrained=models/llama"])
    assert (config.model.from_pretrained, config.model.preset) == ("models/llama", None)
    text = MINIMAL.replace("preset: llama_60m", "from_pretrained: models/llama")
    config = load_run_config([write(tmp_path, text, "b.yaml")], ["model.preset=llama_60m"])
    assert (config.model.from_pretrained, config.model.preset) == (None, "llama_60m")
    both = ["model.from_pretrained=models/llama", "model.preset=llama_60m"]
    assert "must not be given with model.from_pretrained" in problems_of([preset], both)
    text = MINIMAL.replace("preset:", "from_pretrained: models/llama, preset:")
    assert "must not be given with" in problems_of([write(tmp_path, text, "c.yaml")], [])


def test_validation_data_are_one_set_or_several_by_name(tmp_path: Path) -> None:
    base = write(tmp_path, MINIMAL.replace("data/c4", "data/c4, validation: {c4: v, mix: [m, n]}"))
    data = load_run_config([base]).data
    assert data.validation_sets == {"c4": ("v",), "mix": ("m", "n")}
    again = write(tmp_path, dump_config(load_run_config([base])), "again.yaml")
    assert load_run_config([again]).data == data
    one = load_run_config([base], ["data.validation=v"]).data
    assert one.validation == ("v",) and one.validation_sets == {"": ("v",)}
    none = load_run_config([base], ["data.validation=null"]).data
    assert none.validation is None and none.validation_sets == {}
    more = load_run_config([base], ["data.validation.books=b"]).data
    assert list(more.validation_sets) == ["c4", "mix", "books"]


@pytest.mark.parametrize(
    "value, message",
    [
        ("{}", "must name at least one set"),
        ("{a b: v}", "must have names of letters, digits and _ . -, not 'a b'"),
        ("{a: 3}", "must be a folder, a list of folders, or a mapping of names to these"),
        ("[v, 3]", "must be a folder, a list of folders, or a mapping of names to these"),
        ("7", "must be a folder, a list of folders, or a mapping of names to these"),
    ],
)
def test_other_validation_data_are_refused(tmp_path: Path, value: str, message: str) -> None:
    found = problems_of([write(tmp_path, MINIMAL)], [f"data.validation={value}"])
    assert "data.validation = " in found and message in found
    assert "\n" not in found


def test_scale_has_no_moments_of_factors_to_reset(tmp_path: Path) -> None:
    given = ["optimizer.name=scale", "restarts={every: 5, reset_scope: factors}"]
    message = problems_of([write(tmp_path, MINIMAL)], given)
    assert "restarts.reset_scope = 'factors': factors have no moments with optimizer" in message
    config = load_run_config([write(tmp_path, MINIMAL)], [given[0], "restarts.every=5"])
    assert config.optimizer.momentum == 0.9


def test_transferred_learning_rates_have_no_rule_for_a_fixed_offset(tmp_path: Path) -> None:
    given = ["method.lr_transfer={base_width: 64, base_rank: 16}", "method.dlr_alpha=1"]
    message = problems_of([write(tmp_path, MINIMAL)], given)
    assert "does not cover a fixed offset of B, but method.dlr_alpha is 1:" in message
