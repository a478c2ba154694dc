"""The model card (README.md) of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DENSE = """The weights are dense: factors were multiplied out in float32
and rounded once."""
FACTORIZED = """The matrices are stored as factors, with
the code that applies them, `modeling_factorized.py`. Where megalr is installed, `import
megalr.hf.auto` loads the model without `trust_remote_code`."""


TRAINED = "A language model trained by megalr."


def model_card(
    name: str,
    tags: list[str],
    rows: Mapping[str, Any],
    factorized: bool = False,
    origin: str = TRAINED,
) -> str:
    """Markdown with Hugging Face's metadata: a table of ``rows`` and how to load the model.

    Args:
        name: title.
        tags: search terms.
        rows: facts about the training by name; None is shown as "not known".
        factorized: whether the folder holds factors instead of dense matrices.
        origin: the sentence that says where the model comes from.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["megalr", *tags]
    )
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    trust = ", trust_remote_code=True" if factorized else ""
    return f"""---
{data.to_yaml()}
---

# {name}

{origin} {FACTORIZED if factorized else DENSE}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def _cell(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).replace("|", "\\|")
