"""What a run shows on the terminal: a head, a line per event, an end with what to type next."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any, TextIO

from megalr.run.event_lines import event_line
from megalr.run.units import WIDTH, clip, clock, compact, four_digits, loss_text

COLOURS = {
    "eval": "32",
    "eval_further": "32",
    "restart": "36",
    "merge": "36",
    "skip": "33",
    "spike": "33",
    "reset": "33",
    "rollback": "31",
    "checkpoint": "2",
    "compile": "2",
    "start": "1",
    "end": "1",
}
"""SGR codes of the beginning of an event's lines."""

LABEL = 10
"""Columns of the label in the lines at the start and the end."""


class Terminal:
    """Shows events as lines of at most 80 columns; only paths and commands may be longer.

    A file gets the same lines without colour.

    Args:
        out: where the lines go.
        folder: the run's folder, as the user wrote it.
        total_updates: of the whole run.
        config: resolved configuration.
    """

    def __init__(
        self, out: TextIO, folder: Path, total_updates: int, config: dict[str, Any]
    ) -> None:
        self._out, self._folder, self._total, self._config = out, folder, total_updates, config
        self._colour = has_colour(out)
        self._again = "the same command"
        self._saved: tuple[int, str] | None = None
        self._evaluation: tuple[int, dict[str, Any]] | None = None

    def show(self, event: str, update: int, numbers: dict[str, Any]) -> None:
        """Write the lines of an event.

        Raises:
            OSError: the disk is full, or nobody reads the pipe.
        """
        if event in ("checkpoint", "resume"):
            self._saved = (update, numbers["path"])
        if event == "eval":
            self._evaluation = (update, numbers)
        if event == "start":
            lines = self._start(numbers)
        elif event == "end":
            lines = self._end(update, numbers)
        elif event == "signal":
            lines = []  # the end says it
        else:
            lines = [event_line(event, update, self._total, numbers)]
        for line in lines:
            self._print(line, COLOURS.get(event))

    def _print(self, line: str, colour: str | None) -> None:
        if self._colour and colour is not None:
            head, space, rest = line.partition("  ")
            line = f"\x1b[{colour}m{head}\x1b[0m{space}{rest}" if head else line
        encoding = self._out.encoding or "utf-8"
        text = line.encode(encoding, "backslashreplace").decode(encoding)
        print(text, file=self._out, flush=True)

    def _start(self, n: dict[str, Any]) -> list[str]:
        """Model, method, machine, an update, the data, the folder."""
        if n["world_size"] == 1:
            self._again = own_command()
        train, length = self._config["train"], self._config["data"]["sequence_length"]
        sequences = train["global_batch_size"]
        tokens = sequences * length
        parameters = f"{compact(n['parameters'])} parameters"
        if n["trainable_parameters"] != n["parameters"]:
            parameters += f", {compact(n['trainable_parameters'])} of them trainable"
        split = f"{n['world_size']} x {n['versions']['device']}"
        if n["tensor_parallel_size"] > 1:
            split += f", tensor parallel {n['tensor_parallel_size']} ({n['layout']})"
        known = {
            "model": f"{n['model']}, {parameters}",
            "method": f"{n['method']}, {n['optimizer']}",
            "on": f"{split}, {n['precision']}, ZeRO {n['zero_stage']}",
            "update": f"{compact(tokens)} tokens: {sequences} sequences of {length}",
            "run": f"{compact(self._total)} updates, {compact(self._total * tokens)} tokens; "
            f"the data have {compact(n['train_tokens'])}",
        }
        if n["tokenizer_ids"] <= n["vocab_size"] // 2:
            known["note"] = f"most ids are unused: model.vocab_size={n['tokenizer_ids']} would do"
        lines = [clip(_labelled(label, text)) for label, text in known.items()]
        lines.append(_labelled("folder", str(self._folder)))
        if self._config["log"]["tensorboard"]:
            lines.append(_labelled("watch", f"tensorboard --logdir {self._quoted()}"))
        return [*lines, _labelled("stop", "Ctrl-C saves and stops; twice, it stops at once")]

    def _end(self, update: int, n: dict[str, Any]) -> list[str]:
        """The result, or where the run stopped; what to type next."""
        times = f"{clock(n['seconds'])}, of which {clock(n['train_seconds'])} training"
        if n["reason"] != "finished":
            return self._stopped(update, n["reason"], times)
        lines = [clip(_labelled("finished", f"{update} updates in {times}"))]
        if self._evaluation is not None:
            at, found = self._evaluation
            result = f"{four_digits(found['perplexity'])} (loss {loss_text(found['loss'])})"
            of = f" on {found['validation']}" if "validation" in found else ""
            lines.append(clip(_labelled("ppl", f"{result}{of} after update {at}")))
        lines.append(_labelled("folder", str(self._folder)))
        lines.append(_labelled("next", f"megalr report {self._quoted()}"))
        if self._saved is not None:
            export = f"megalr export {self._quoted()} --output OUTPUT"
            lines.append(_labelled("", export))
        return lines

    def _stopped(self, update: int, reason: str, times: str) -> list[str]:
        text = f"after update {update} of {self._total} ({reason}) in {times}"
        saved = "nothing, since no update was made"
        if self._saved is not None:
            saved = f"update {self._saved[0]} in {self._folder / self._saved[1]}"
        return [
            clip(_labelled("stopped", text)),
            _labelled("saved", saved),
            _labelled("to go on", self._again),
        ]

    def _quoted(self) -> str:
        return shlex.quote(str(self._folder))


def has_colour(out: TextIO) -> bool:
    """Whether it is a terminal that shows colours, and NO_COLOR (no-color.org) is not set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return out.isatty() and not plain


def fitted(line: str, out: TextIO) -> str:
    """A long line, broken at 80 columns if ``out`` is a terminal; whole in a file."""
    if not out.isatty():
        return line
    indent = " " * (len(line.split(" ", 1)[0]) + 1)
    return textwrap.fill(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def own_command() -> str:
    """The command line of this process, as one would type it."""
    program = Path(sys.argv[0])
    words = ["python", sys.argv[0]] if program.suffix == ".py" else [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def _labelled(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"
