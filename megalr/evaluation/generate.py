"""Text from a run's checkpoint or from a transformers folder, sampled by transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalr.errors import UserError
from megalr.evaluation.offline import open_transformers
from megalr.hf.families import families_of
from megalr.hf.trained_run import load_decoder, open_verified, run_config, tokenizer_of
from megalr.hf.write import DTYPES, ExportOptions, transformers_model
from megalr.models.build import has_dense_weights
from megalr.preprocessing.tokenizer import holds_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits z.

    Attributes:
        max_new_tokens: most tokens behind the prompt; an end-of-text token ends earlier.
        temperature: tokens are drawn with probabilities softmax(z / temperature); 0: the most
            probable one is taken.
        top_p: only from the fewest tokens whose probabilities add up to this much.
        seed: of torch's random generators.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class TextModel:
    """A transformers model with the tokenizer that it was trained with.

    Attributes:
        model: ``AutoModelForCausalLM``, in eval mode.
        encode: a prompt to ids, with what the model expects in front of a text.
        decode: ids to text.
        vocab_size: ids that the tokenizer knows; the model may have more.
        eos_ids: end a text.
    """

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    vocab_size: int
    eos_ids: list[int]


def text_model_of_run(run: Path, tag: str | None, dtype: str | None) -> TextModel:
    """The model of a checkpoint, as an export would write it but in memory.

    Args:
        run: the run's folder.
        tag: name of the checkpoint; None: the newest finished one.
        dtype: key of DTYPES; None: float32 for a run in fp32, else bfloat16.

    Raises:
        UserError: no such run or checkpoint, a damaged one, or a model that transformers lacks.
    """
    checkpoint = open_verified(run, tag)
    config = run_config(checkpoint)
    tokenizer = tokenizer_of(config)
    decoder = load_decoder(run, checkpoint)
    form = "dense" if has_dense_weights(config.method) else "factorized"
    dtype = dtype or ("float32" if config.train.precision == "fp32" else "bfloat16")
    options = ExportOptions(dtype, "5GB", config.data.sequence_length, None, form)
    model = transformers_model(decoder, families_of(decoder.config)[0], options, tokenizer)
    fill_buffers(model)
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def encode(text: str) -> list[int]:
        # Training's documents follow an end of text, and so does a text without a beginning.
        return [int(number) for number in tokenizer.encode([text], False)[0]] or eos

    return TextModel(model.eval(), encode, tokenizer.decode, tokenizer.vocab_size, eos)


def fill_buffers(model: Any) -> None:
    """Make the buffers that an export does not hold, since they follow from the configuration: the
    frequencies of rotary positions. ``model`` has them on the meta device; changed in place."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(model.config))


def text_model_of_folder(folder: Path, dtype: str | None) -> TextModel:
    """The model and tokenizer of a transformers folder.

    Args:
        folder: exported or downloaded.
        dtype: key of DTYPES; None: the model's own.

    Raises:
        UserError: transformers cannot load it, or it holds no tokenizer.
    """
    model = open_transformers(folder)
    if not holds_tokenizer(folder):
        raise UserError(f"{folder} holds no tokenizer: export the run again with one")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]

    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"] or eos_ids[:1]

    if dtype is not None:
        model = model.to(DTYPES[dtype])
    size = max(tokenizer.get_vocab().values()) + 1
    return TextModel(model.eval(), encode, tokenizer.decode, size, eos_ids)


def sample_text(source: TextModel, prompt: str, sampling: Sampling) -> str:
    """The prompt and what the model writes behind it.

    Raises:
        UserError: the prompt has no tokens, or ids that the model lacks.
    """
    from transformers import GenerationConfig

    model, ids = source.model, source.encode(prompt)
    size = model.config.vocab_size
    if not ids or max(ids) >= size:
        what = "has no tokens" if not ids else f"has id {max(ids)} and the model {size} ids"
        raise UserError(f"--prompt {prompt!r:.60} {what}: give another prompt or model")
    greedy = sampling.temperature == 0
    # In place of the folder's own settings, which would add to these.
    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not greedy,
        temperature=None if greedy else sampling.temperature,
        top_p=None if greedy else sampling.top_p,
        top_k=None if greedy else 0,  # transformers' default is 50
        eos_token_id=source.eos_ids or None,
        pad_token_id=source.eos_ids[0] if source.eos_ids else 0,
        suppress_tokens=list(range(source.vocab_size, size)) or None,
    )
    torch.manual_seed(sampling.seed)
    inputs = torch.tensor([ids], device=model.device)  # (1, S)
    with torch.no_grad():
        found = model.generate(inputs, attention_mask=torch.ones_like(inputs))[0].tolist()
    if found[-1] in source.eos_ids and len(found) > len(ids):
        found.pop()
    # A tokenizer may write the first piece of a text without its space: so decode everything.
    before, text = source.decode(ids), source.decode(found)
    return prompt + (text[len(before) :] if text.startswith(before) else text)
