"""The benchmark of decoding generates what transformers generates, and reads back what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import decode
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalr.errors import UserError
from tests.models.settings import tiny

SIZES = tiny(num_kv_heads=6)
PROMPTS = torch.randint(2, 101, (2, 9), generator=torch.Generator().manual_seed(1))
VARIANTS = decode.variants(SIZES, 8)


class Waits(TorchDispatchMode):
    """Names of the operators that make the host wait for a device: no CUDA graph holds them."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "item")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__ in self.NAMES:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_ranks_are_the_recipes_and_shares_of_the_hidden_size() -> None:
    assert [(v.form, v.rank, v.shared) for v in VARIANTS] == [
        ("dense", None, False),
        ("product", 8, True),
        ("product", 8, False),
        ("product", 6, True),
        ("product", 12, True),
        ("product", 24, True),
        ("sparse", 8, False),
    ]


def test_a_padded_size_has_the_width_of_an_export_that_keeps_padding() -> None:
    widths = [decode.sizes_of(name).intermediate_size for name in ("1b", "1b_padded", "7b")]
    assert widths == [5461, 5504, 11008]


def test_the_rows_that_tell_most_come_first() -> None:
    rows = decode.cells(VARIANTS)
    assert len(rows) == len(set(rows)) == 7 * 4 + 2 * 2 + 2 * 2
    main, others = VARIANTS[:2], VARIANTS[2:]
    order = [(way, v) for way in ("graph", "compiled") for v in main]
    order += [("graph", v) for v in others] + [("eager", v) for v in main]
    assert list(dict.fromkeys((way, variant) for variant, _, way in rows)) == order


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_steps_give_the_tokens_of_generate_and_never_wait(variant: decode.Variant) -> None:
    torch.manual_seed(0)
    model = decode.build(SIZES, variant, "cpu").float()
    for parameter in model.parameters():
        parameter.mul_(4)
    decoding = decode.Decoding(model, PROMPTS, 8)
    with Waits() as waits:
        found = torch.cat(decoding.steps(decoding.eager(), 8), dim=1)
    assert waits.found == []
    expected = model.generate(PROMPTS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected[:, 9:])
    again = torch.cat(decoding.steps(decoding.eager(), 8), dim=1)
    assert torch.equal(again, found)  # a prefill starts over


def test_weights_are_counted_as_stored() -> None:
    matrices = 2 * (4 * 48 * 48 + 3 * 48 * 83)
    others = 2 * 101 * 48 + 5 * 48
    counts = {v: decode.weight_bytes(decode.build(SIZES, v, "cpu")) for v in VARIANTS}
    assert counts[VARIANTS[0]] == 2 * (matrices + others)
    factors = 2 * (4 * 2 * 48 + 3 * (48 + 83))
    for variant in VARIANTS[1:6]:
        assert counts[variant] == 2 * (factors * variant.rank + others)
    entries = 2 * (4 * int(0.03 * 48 * 48) + 3 * int(0.03 * 48 * 83))
    assert counts[VARIANTS[6]] == 2 * (factors * 8 + others) + (2 + 4) * entries


def test_a_cell_is_measured_and_a_failure_is_one_line() -> None:
    model = decode.build(SIZES, VARIANTS[1], "cpu")
    found = decode.measure(model, 2, "eager", "cpu", 9, 4)
    assert found["decode_tokens_per_second"] == pytest.approx(2e3 / found["step_ms"], rel=0.01)
    assert found["prefill_tokens_per_second"] == pytest.approx(18e3 / found["prefill_ms"], rel=0.01)
    failed = decode.measure(model, 2, "graph", "cpu", 9, 4)
    assert set(failed) == {"failed"} and "\n" not in failed["failed"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size "350m" of 16 rows that a CPU measures in seconds."""
    monkeypatch.setitem(decode.PRESETS, "llama_350m", tiny(num_kv_heads=6, hidden_size=96))
    monkeypatch.setitem(decode.RECIPE_RANKS, "350m", 16)
    for name, value in {"BATCHES": (1, 2), "EAGER_BATCHES": (2,), "PROMPT": 8, "NEW": 4}.items():
        monkeypatch.setattr(decode, name, value)
    monkeypatch.setattr(decode, "COMPILED_BATCHES", ())


@pytest.mark.long
def test_a_size_is_measured_row_by_row_until_its_time_is_up(small: None) -> None:
    rows = decode.measure_size("350m", 600.0, "cpu")
    assert len(rows) == 7 * 2 + 2
    assert [row["form"] for row in rows if "step_ms" in row] == ["dense", "product"]
    assert all("failed" in row for row in rows if row["way"] == "graph")  # no GPU here
    late = decode.measure_size("350m", -1.0, "cpu")
    assert {row["failed"] for row in late} == {"not measured: out of time"}
    assert len(decode.table(rows + late).splitlines()) == 2 + 7 + 2


@pytest.mark.long
def test_a_call_that_is_stopped_goes_on_from_its_file(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, measured = tmp_path / "decode.json", []
    monkeypatch.setattr(decode, "cuda_device", lambda: "a device")
    provenance = {"commit": "1234567", "versions": {"torch": "2.11"}}
    monkeypatch.setattr(decode, "provenance", lambda packages: dict(provenance))
    monkeypatch.setattr(decode, "build", lambda *_: torch.nn.Linear(2, 2))

    def measure(
        model: object, batch: int, way: str, device: str, prompt: int, new: int
    ) -> dict[str, object]:
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append((batch, way))
        if len(measured) == 2:
            return {"failed": "out of memory"}
        return {"decode_tokens_per_second": len(measured), "prefill_tokens_per_second": 1}

    monkeypatch.setattr(decode, "measure", measure)

    def call(*options: str) -> dict[str, Any]:
        arguments = ["decode.py", "--sizes", "350m", "--output", str(path), *options]
        monkeypatch.setattr("sys.argv", arguments)
        decode.main()
        return json.loads(path.read_text())

    stop = 5
    with pytest.raises(KeyboardInterrupt):
        call()
    kept = json.loads(path.read_text())["rows"]
    assert [row.get("decode_tokens_per_second") for row in kept] == [1, None, 3, 4, 5]

    stop = 99
    result = call("--seconds", "-1")  # what is known stays, the rest is listed
    assert len(measured) == 5 and result["rows"][:5] == kept and len(result["rows"]) == 16
    result = call()
    assert measured[5:] == [measured[1], *((batch, way) for _, batch, way in rest(5))]
    assert result["rows"][0] == kept[0] and result["rows"][2:5] == kept[2:]
    assert [row["decode_tokens_per_second"] for row in result["rows"]] == [
        *(1, 6, 3, 4, 5), *range(7, 18)
    ]  # fmt: skip
    assert len(result["earlier"]) == 2 and result["earlier"][0] == {"commit": "1234567"}
    call()
    assert len(measured) == 17
    assert "earlier" not in call("--again") and len(measured) == 17 + 16

    monkeypatch.setattr(decode, "cuda_device", lambda: "another device")
    with pytest.raises(UserError, match="measured with device a device, here it is another device"):
        call()
    path.write_text("[")
    with pytest.raises(UserError, match="cannot be continued"):
        call()


def rest(first: int) -> list[tuple[decode.Variant, int, str]]:
    """The rows of the small size from one on."""
    sizes = decode.PRESETS["llama_350m"]
    return decode.cells(decode.variants(sizes, decode.RECIPE_RANKS["350m"]))[first:]


def test_the_table_compares_with_the_dense_model_of_the_same_way() -> None:
    row = {"size": "1b", "form": "dense", "rank": None, "shared": False, "way": "graph"}
    speed = {"prefill_tokens_per_second": 90000, "weights_gib": 2.5}
    product = {**row, "form": "product", "rank": 512, "shared": True}
    rows = [
        {**row, **speed, "batch": 1, "decode_tokens_per_second": 1000},
        {**row, **speed, "batch": 4, "decode_tokens_per_second": 3000},
        {**product, **speed, "batch": 1, "decode_tokens_per_second": 1500, "weights_gib": 1.2},
        {**product, "batch": 4, "failed": "not measured: out of time"},
    ]
    lines = decode.table(rows).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[3].count("|")
    assert lines[2].startswith("| 1b | dense |  |  | 2.5 | graph | 1,000 (1.00x) | 3,000 (1.00x) |")
    assert (
        lines[3] == "| 1b | product | 512 | yes | 1.2 | graph | 1,500 (1.50x) | failed | failed |"
    )
