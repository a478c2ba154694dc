"""What a mutated YAML or DeepSpeed JSON does to --print_config: a resolved run, or plain lines."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalr.cli.train import pretrain_command
from megalr.config import load_run_config
from megalr.engine.config import describe_deepspeed
from megalr.errors import UserError

RUN = """
run: {dir: runs/x, seed: 3, timeout_seconds: 100}
model: {preset: llama_9m, num_layers: 2, norm_eps: 1e-6, sliding_window: null}
method: {name: low_rank, rank: 16, alpha: 32, targets: [q, k, v, o]}
optimizer: {name: stable_spam, lr: 1e-3, betas: [0.9, 0.99], gamma1: 0.7}
schedule: {name: cosine, warmup_updates: 2, min_lr_ratio: 0.1}
data: {train: [{path: a, weight: 1}, {path: b, weight: 2.5}], sequence_length: 64}
train:
  updates: 20
  global_batch_size: 16
  micro_batch_size: 4
  precision: bf16
  activation_checkpointing: none
restarts: {every: 5, reset_moments: [first, second], lr_recovery: linear}
health: {max_skipped: 3, spike_threshold: 5.0}
checkpoint: {every: 10, keep_last: 2}
log: {every: 1, wandb_project: null}
"""
DEEPSPEED: dict[str, Any] = {
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 500000,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "communication_data_type": "bf16",
    "wall_clock_breakdown": False,
    "comms_logger": {"enabled": False, "prof_ops": []},
    "tensorboard": {"enabled": False},
    "steps_per_print": 10,
    "checkpoint": {"tag_validation": "Warn"},
}
NASTY = [
    None, True, False, 0, -1, 1, 2, 7, 10**6, 10**12, 2**63, 10**400, -1e-300, 0.5, 1e30, 1e308,
    float("inf"), float("nan"), "", "auto", "none", "cpu", "x" * 5000, "a\nb", "\x00", "\ud800",
    "..", "1", "1e5", [], [[]], [1, "a"], {}, {"enabled": True}, {"name": "x"}, [None] * 50,
]  # fmt: skip


def print_config(folder: Path, run: str, deepspeed: str) -> tuple[str, str]:
    """(what is printed, "") or ("", the error) of the launcher in this process."""
    config, ds_config = folder / "run.yaml", folder / "ds.json"
    config.write_text(run, encoding="utf-8", errors="surrogatepass")
    ds_config.write_text(deepspeed, encoding="utf-8", errors="surrogatepass")
    arguments = ["--config", str(config), "--deepspeed_config", str(ds_config), "--print_config"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["pretrain.py", *arguments])
        patch.setenv("DS_ACCELERATOR", "cpu")
        try:
            assert pretrain_command() == 0
        except UserError as error:
            return "", str(error)
    return printed.getvalue(), ""


def check(folder: Path, run: str, deepspeed: str) -> bool:
    """Whether the inputs are accepted; that they are answered as they should be."""
    printed, error = print_config(folder, run, deepspeed)
    if error:
        for line in error.splitlines():
            assert line.isprintable() and 10 < len(line) < 1500, line
        error.encode("utf-8")
        return False
    again = folder / "again.yaml"
    again.write_text(printed, encoding="utf-8")
    assert load_run_config([again]) is not None
    block = printed.partition("# DeepSpeed configuration")[2].partition("\n")[2]
    resolved = json.loads(block.replace("\n# ", "\n").removeprefix("# "))
    assert resolved["zero_optimization"]["stage"] in (0, 1, 2, 3)
    return True


def places(values: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    found = []
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        found.append((values, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def mutated(values: Any, rng: random.Random) -> Any:
    """A copy with one to three values replaced, removed, renamed or moved elsewhere."""
    values = json.loads(json.dumps(values))
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(values))
        kind = rng.random()
        if kind < 0.7 or isinstance(container, list):
            container[key] = copy.deepcopy(rng.choice(NASTY))
        elif kind < 0.8:
            del container[key]
        elif kind < 0.9:
            container[str(key) + rng.choice(["x", "\n", " ", ".a", ""])] = container.pop(key)
        else:
            other, name = rng.choice(places(values))
            other[name] = json.loads(json.dumps(container[key]))
    return values


def scrambled(text: str, rng: random.Random) -> str:
    """The text with a few characters removed, doubled or replaced."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text))
        new = rng.choice(["", text[place] * 2, *":{}[]&*!|>-'\"#,\t\n\x00%@9eE.~\u2028"])
        text = text[:place] + new + text[place + 1 :]
    return text


@pytest.mark.parametrize("seed", range(5))
def test_mutations_of_both_files_are_resolved_or_refused_in_plain_lines(
    tmp_path: Path, seed: int
) -> None:
    rng, accepted = random.Random(seed), 0
    run, deepspeed = yaml.safe_load(RUN.replace("1e-", "1.0e-")), json.dumps(DEEPSPEED)
    assert check(tmp_path, RUN, deepspeed)
    for _ in range(30):
        text = yaml.safe_dump(mutated(run, rng), allow_unicode=rng.random() < 0.5)
        accepted += check(tmp_path, text, deepspeed)
        accepted += check(tmp_path, scrambled(RUN, rng), deepspeed)
        accepted += check(tmp_path, RUN, json.dumps(mutated(DEEPSPEED, rng)))
        accepted += check(tmp_path, RUN, scrambled(deepspeed, rng))
    assert 0 < accepted < 60  # most mutations are mistakes


MANY = "[" * 40 + "]" * 40
HOSTILE = [
    ("a: " + "[" * 20000 + "]" * 20000, "nested too deeply"),
    ("a: " + MANY, "nested more than 32 deep"),
    ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefg", "bcdefgh",
        strict=True)), "more than 100000 values"),
    ("a: &a {b: [*a]}", "an alias contains itself"),
    ("a: 1\n" * 300_000, "larger than 1,000,000 bytes"),
    (RUN.replace("seed: 3", "seed: " + "9" * 5000), "Exceeds the limit"),
    (RUN.replace("seed: 3", "seed: 0x" + "f" * 5000), "run.seed = inf: must be a finite number"),
    (RUN.replace("num_layers: 2", "num_layers: 1000000000000"), "less than or equal to 100000"),
    (RUN.replace("lr: 1e-3", "lr: !!python/object/apply:os.getcwd []"), "not valid YAML"),
    (RUN.replace("run:", '"r\\nun":'), "unknown key"),
]  # fmt: skip
HOSTILE_JSON = [
    ("[" * 200_000, "nested too deeply"),
    ('{"a": ' + MANY + "}", "nested more than 32 deep"),
    ('{"steps_per_print": ' + "9" * 5000 + "}", "Exceeds the limit"),
    ('{"steps_per_print": 1' + "0" * 400 + "}", "must be a number below 2^63"),
    ('{"a": "' + "x" * 1_000_000 + '"}', "larger than 1,000,000 bytes"),
    ('{"steps_per_print": 1e999, "gradient_clipping": NaN}', "gradient_clipping = nan: the run"),
    ('{"a\\nb": 1}', "'a\\nb' = 1: unknown key"),
    ('{"bf16": false}', "bf16.enabled = false: the run asks for true"),
    ("", "not valid JSON"),
]


@pytest.mark.parametrize(
    ("run", "deepspeed", "said"),
    [
        *((run, "{}", said) for run, said in HOSTILE),
        *((RUN, ds, said) for ds, said in HOSTILE_JSON),
    ],
    ids=[*(said for _, said in HOSTILE), *(f"JSON: {said}" for _, said in HOSTILE_JSON)],
)
def test_hostile_files_are_refused_before_they_cost_anything(
    tmp_path: Path, run: str, deepspeed: str, said: str
) -> None:
    printed, error = print_config(tmp_path, run, deepspeed)
    assert not printed and said in error, error
    assert all(line.isprintable() and len(line) < 1500 for line in error.splitlines())


def typed(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value)
    return {int: "number", float: "number", str: "text"}.get(type(value), type(value).__name__)


EXAMPLES = [None, True, 3, 2.5, "text", ["text"], [3], {"key": 3}]
TAKE_MORE = {  # text for a path or an item, a list of them; a number of one of two kinds
    "run.dir": "text", "data.train": "text list dict", "data.validation": "text list dict None",
    "model.from_pretrained": "text None", "log.wandb_project": "text None", "model.preset": "text",
    "run.fork_from": "text None", "method.ranks": "dict None",
}  # fmt: skip


def test_a_value_of_another_type_is_refused_for_every_key(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(RUN, encoding="utf-8")
    config = load_run_config([base])
    optional = {
        f"{section}.{key}"
        for section in type(config).model_fields
        for key, field in type(getattr(config, section)).model_fields.items()
        if type(None) in getattr(field.annotation, "__args__", ())
    }
    wrong = []
    for section, values in config.model_dump(mode="json").items():
        for name, value in values.items():
            key = f"{section}.{name}"
            for example in EXAMPLES:
                fine = {typed(value), *TAKE_MORE.get(key, "").split()}
                fine |= {"None"} if key in optional else set()
                fine |= {"number", "True", "False"} if key in optional and value is None else set()
                fine |= {"True", "False"} if isinstance(value, bool) else set()
                if typed(example) in fine or key == "method.name":
                    continue
                try:
                    load_run_config([base], [f"{key}={json.dumps(example)}"])
                    wrong.append((key, value, example))
                except UserError as error:
                    assert section in str(error)
    assert wrong == []


def test_a_value_of_another_type_is_refused_for_every_key_of_the_json(tmp_path: Path) -> None:
    printed, _ = print_config(tmp_path, RUN, json.dumps(DEEPSPEED))
    block = printed.partition("# DeepSpeed configuration")[2].partition("\n")[2]
    whole = json.loads(block.replace("\n# ", "\n").removeprefix("# "))
    assert check(tmp_path, RUN, json.dumps(whole))  # what is printed is accepted
    base = tmp_path / "base.yaml"
    base.write_text(RUN, encoding="utf-8")
    config, wrong = load_run_config([base]), []
    for i, (container, key) in enumerate(places(whole)):
        before = container[key]
        for example in EXAMPLES:
            container[key] = example
            neutral = example is None or typed(example) == typed(before)
            if not neutral and not (isinstance(before, bool) and isinstance(example, bool)):
                try:
                    describe_deepspeed(config, whole, "ds.json")
                    wrong.append((i, key, before, example))
                except UserError as error:
                    assert str(key) in str(error) and "\n" not in str(error)
        container[key] = before
    assert wrong == []
