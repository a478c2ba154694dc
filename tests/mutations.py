"""Small random damages to the content of a text file, for tests of its reader."""

from __future__ import annotations

from random import Random


def mutated(content: bytes, random: Random) -> bytes:
    """The content with one to four small damages."""
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(content))
        end = min(len(content), place + random.randint(1, 12))
        piece = random.choice(
            [
                b"",
                content[place:end] * 2,
                bytes([random.randrange(256)]),
                random.choice([b"null", b"-1", b"1e999", b'"', b"[", b"}", b"true", b"NaN", b"\n"]),
            ]
        )
        content = content[:place] + piece + content[end:]
    return content
