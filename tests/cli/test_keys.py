"""``megalr keys`` and ``megalr recipes`` against the schema and the files themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megalr.cli.main import main
from megalr.config.problems import known_keys, section_classes
from megalr.config.schema import RunConfig
from megalr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(words)
    return capsys.readouterr().out


@pytest.mark.parametrize("section", list(RunConfig.model_fields))
def test_every_key_of_a_section_is_explained_within_the_terminals_width(
    section: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    lines = printed(capsys, "keys", section).splitlines()
    assert max(map(len, lines)) <= 70
    heads = {line.split()[0] for line in lines if line.startswith(f"  {section}.")}
    # The name of a section with several kinds stands in the headings.
    classes = section_classes(RunConfig, section)
    names = {f"{section}.name"} if len(classes) > 1 else set()
    assert heads == {key for key in known_keys(RunConfig) if key.startswith(f"{section}.")} - names
    text = " ".join(" ".join(lines).split())
    for cls in classes.values():
        for field in cls.model_fields.values():
            assert " ".join((field.description or "").split()) in text


def test_a_kind_a_key_and_a_mapping_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    spam = printed(capsys, "keys", "optimizer.name=spam")
    fields = section_classes(RunConfig, "optimizer")["spam"].model_fields
    assert all(f"optimizer.{name} " in spam for name in fields)
    eps = printed(capsys, "keys", "optimizer.eps")
    for name, cls in section_classes(RunConfig, "optimizer").items():
        before, _, after = eps.partition(name)
        assert before and f"default {cls.model_fields['eps'].default}" in after
    assert printed(capsys, "keys", "optimizer.lr").count("optimizer.lr ") == 1  # the same for all
    assert "optimizer.lr_ratio.embedding" in printed(capsys, "keys", "optimizer.lr_ratio")
    assert "path  (text; required)" in printed(capsys, "keys", "data.train")
    sections = printed(capsys, "keys")
    assert all(line in sections for line in RunConfig.model_fields)


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        ("optimzer", "optimizer"),
        ("optimizer.lrr", "optimizer.lr"),
        ("train.update", "train.updates"),
        ("method.name=sltrian", "method.name=sltrain"),
    ],
)
def test_an_unknown_place_names_the_nearest(place: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {meant}[?] "):
        main(["keys", place])


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = printed(capsys, "recipes").replace(",", " ").split()
    for path in (*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "ds_configs").glob("*.json")):
        assert path.stem in words
    text = printed(capsys, "recipes", "llama_60m_spam")
    assert text == (ROOT / "recipes" / "methods" / "llama_60m_spam.yaml").read_text()
    assert yaml.safe_load(text)["optimizer"]["name"] == "spam"
    with pytest.raises(UserError, match="did you mean llama_60m_spam"):
        main(["recipes", "llama_60m_spm"])
