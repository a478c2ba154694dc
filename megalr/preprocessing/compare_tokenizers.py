"""Whether two tokenizers give the same ids: piece by piece, and on lines that tell them apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Protocol

PROBES = (
    "The Cat's 123 ids, é中! w5 w6",
    "first line\nsecond\tline\r\n\n\nfourth",
    "  two  spaces,   three    four ",
    " ",
    "\t\t\tx = [0, 1];\n        y = x[12345678901234567890]\n",
    "007 3.14 1,000,000 10e-5 ٣٤ ²½",
    "naïve café Straße ÅÉ ﬁne ＦＵＬＬ①",
    "e\u0301 o\u0308 (combining)",
    "漢字 かな 한국어 Ελληνικά русский العربية हिन्दी",
    "😀 👍🏽 👨‍👩‍👧 🇩🇪 ❤️",
    "\u00a0no-break\u200bzero\u2028line\ufeff",
    "▁lower▁eighth",
    "<n> [INST] <|x|> {} http://example.org/?q=1&r=%20",
    "aaaaaaaaaaaaaaaa bbbbb abababab ......... -------- ========",
)
"""Runs of white space, digits, symbols, composed and decomposed letters, scripts, emoji, code."""


class Comparable(Protocol):
    """The part of preprocessing.tokenizer's Tokenizer that is compared."""

    def encode(self, texts: list[str], append_eos: bool) -> tuple[Any, Any]:
        """Concatenated ids of all texts and the number of ids of each text."""
        ...

    def piece_ids(self) -> dict[str, int]:
        """Every piece of the vocabulary with its id."""
        ...

    def is_tie(self, ids: list[int], others: list[int]) -> bool:
        """Whether both are segmentations of one text that the model scores alike."""
        ...


def tokenizer_difference(expected: Comparable, found: Comparable) -> str | None:
    """Where ``found`` gives other ids than ``expected``, in words; None if it does not.

    ``found`` may have more pieces, as when special tokens were added to it. Ties between
    segmentations of a unigram model are no difference: rounding decides them.
    """
    return piece_difference(expected.piece_ids(), found.piece_ids()) or probe_difference(
        expected, found
    )


def piece_difference(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    """The first piece of ``expected`` with another id in ``found``."""
    for piece, number in sorted(expected.items(), key=lambda item: item[1]):
        if found.get(piece) != number:
            return f"{piece!r} is {number} there and {found.get(piece, 'no id')} here"
    return None


def probe_difference(expected: Comparable, found: Comparable) -> str | None:
    """The first of PROBES that the two encode differently."""
    lines = list(PROBES)
    for line, there, here in zip(
        lines, encoded_lines(expected, lines), encoded_lines(found, lines), strict=True
    ):
        if there == here or expected.is_tie(there, here) or found.is_tie(there, here):
            continue
        return f"{line!r} becomes {shortened(there)} there and {shortened(here)} here"
    return None


def encoded_lines(tokenizer: Comparable, lines: list[str]) -> Iterator[list[int]]:
    """The ids of each line, without EOS."""
    ids, lengths = tokenizer.encode(lines, append_eos=False)
    return (ids[i:j].tolist() for i, j in pairwise([0, *lengths.cumsum().tolist()]))


def shortened(ids: list[int]) -> str:
    """A list of ids of which a message shows at most 12."""
    return str(ids) if len(ids) <= 12 else f"[{', '.join(map(str, ids[:12]))}, ...]"
