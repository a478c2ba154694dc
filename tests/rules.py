"""Rules of the code base that no linter knows; ``make lint`` runs them.

python -m tests.rules           every violation, one a line; exit code 1 if there are any
python -m tests.rules --count   the figures of docs/dev/architecture.md

An exception stands in a table below, with its reason.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PRIVATE = re.compile(
    r"_hp_\w*|fp32_groups\w*|fp32_partitioned\w*|bit16_\w*|bf16_groups|fp16_groups|fp16_partitioned\w*"
    r"|single_partition\w*|averaged_gradients|round_robin_\w*|ipg_\w*|ds_(ids?|shape|numel|tensor|"
    r"process_group|status)|partition_numel|zero_optimization_stage|seq_data_parallel_group"
    r"|data_parallel_group|dp_world_size|mp_world_size|basic_optimizer|skipped_steps"
    r"|was_step_applied|get_global_grad_norm|update_lp_params|cpu_offload"
)
"""Attributes of DeepSpeed's engine, wrappers and parameters."""

METHODS = re.compile(
    r"(full_rank|low_rank|sltrain|lora|relora|cola|loro|galore|fira|golore|apollo|apollo_mini)"
)

TICS = re.compile(
    r"\b(anew|for ever|in silence|hear[sd]? of|left out|stands? still|of our own|is none of|so many"
    r"|plain twin)\b"
)

LONGEST_FILE, SHORTEST_FILE, MOST_FILES, LONGEST_FUNCTION = 400, 60, 16, 60

FILE_SIZES: dict[str, str] = {
    "checkpoint/torch_files.py": "one contract: reading tensors without running code",
    "cli/generate.py": "one command",
    "cli/memory.py": "one command",
    "config/base.py": "one contract: the types that all sections share",
    "config/health.py": "one section, a file like those of the others",
    "distributed/peer_errors.py": "one contract: a lost rank's error in one line",
    "distributed/signals.py": "standard library only, so that a launcher listens at once",
    "hf/auto.py": "one import with one effect: the Auto classes know the factorized ones",
    "hf/card.py": "one text: the model card",
    "restarts/batched_eigh.py": "threads and streams, apart from the algebra that uses them",
}
"""Files outside of the limits, each with the reason."""

LONG_FUNCTIONS: dict[str, str] = {}
"""``file:function`` longer than a screen, each with the reason."""

SAME_NAMES: dict[str, str] = {
    "Restarts": "restarts/ for a run inside an engine, library/ the same for any training loop",
}
"""Public names with more than one definition, each with the reason."""

SAME_FILES = {
    "__init__.py": "every room has one",
    "attention.py": "the layer and its custom kernel",
    "build.py": "builds the room's object from the configuration",
    "config.py": "the settings of the room",
    "generate.py": "evaluation/ samples, cli/ prints",
    "health.py": "config/ declares the section, training/ decides by it",
    "manifest.py": "the record of a folder that the room writes and reads",
    "methods.py": "config/ declares the methods, optim/ chooses their optimizer",
    "memory.py": "estimate/ computes it, cli/ prints it",
    "embedding.py": "the layer and its custom kernel",
    "norm.py": "the layer and its custom kernel",
    "schedules.py": "config/ declares the sections, optim/ computes them",
    "restarts.py": "config/ declares the section, library/ has its class for any training loop",
}
"""File names that several rooms share, each with the job it does."""

METHOD_PLACES = {
    "cli/formats.py": "an option names the method to try",
    "config/": "declares the methods",
    "models/build.py": "chooses the layers",
    "optim/methods.py": "chooses the optimizer",
    "estimate/": "formulas of bytes differ by method, and nothing is built that could be asked",
}

KEYS_OF_FILES = {
    "checkpoint/source.py": "skipped_steps is a key of state.json",
}
"""Files with a name of DeepSpeed's that is a key of a file format."""


@dataclass(frozen=True)
class Source:
    """One Python file of the package.

    Attributes:
        path: relative to ``megalr/``.
        text: its content.
    """

    path: str
    text: str

    @property
    def room(self) -> str:
        """The folder below ``megalr/``; empty for a file of the package itself."""
        return self.path.split("/")[0] if "/" in self.path else ""

    @property
    def lines(self) -> int:
        """Lines, blank ones and comments included."""
        return self.text.count("\n")

    @property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.text)


def package(root: Path = ROOT) -> list[Source]:
    """All Python files of the package, sorted by path."""
    folder = root / "megalr"
    return [
        Source(path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
    ]


def deepspeed_outside_engine(sources: list[Source]) -> Iterator[str]:
    """Imports of DeepSpeed and its private attribute names, anywhere but in engine/."""
    for source in sources:
        if source.room == "engine":
            continue
        for line in _imports_of_deepspeed(source):
            yield f"megalr/{source.path}:{line} imports deepspeed: only engine/ may"
        if source.path in KEYS_OF_FILES:
            continue
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type == tokenize.NAME and PRIVATE.fullmatch(token.string):
                where = f"megalr/{source.path}:{token.start[0]}"
                yield f"{where} names DeepSpeed's {token.string}: only engine/ may"


def _imports_of_deepspeed(source: Source) -> list[int]:
    lines = []
    for node in ast.walk(source.tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.split(".")[0] == "deepspeed" for name in names):
            lines.append(node.lineno)  # type: ignore[attr-defined]
    return lines


def rooms_without_a_contract(sources: list[Source]) -> Iterator[str]:
    """Rooms whose ``__init__`` does not say what comes in, goes out and must not be known."""
    for source in sources:
        if source.room and source.path == f"{source.room}/__init__.py":
            text = " ".join((ast.get_docstring(source.tree) or "").split())
            missing = [part for part in ("In:", "Out:", "ust not know") if part not in text]
            if missing:
                yield f"megalr/{source.path} says nothing of: {', '.join(missing)}"


def sizes(sources: list[Source]) -> Iterator[str]:
    """Files, rooms and functions outside of their limits."""
    rooms: dict[str, int] = defaultdict(int)
    for source in sources:
        rooms[source.room] += bool(source.room)
        small = source.lines < SHORTEST_FILE and not source.path.endswith("__init__.py")
        outside = source.room and (small or source.lines > LONGEST_FILE)
        if outside and source.path not in FILE_SIZES:
            limits = f"{SHORTEST_FILE} to {LONGEST_FILE}"
            yield f"megalr/{source.path} has {source.lines} lines, not {limits}"
        for name, length in _functions(source.tree):
            if length > LONGEST_FUNCTION and f"{source.path}:{name}" not in LONG_FUNCTIONS:
                yield f"megalr/{source.path}: {name} has {length} lines without its docstring"
    for room, count in rooms.items():
        if count > MOST_FILES:
            yield f"megalr/{room} has {count} files: at most {MOST_FILES}"


def _functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            if ast.get_docstring(node) is not None:
                body = body[1:]
            if body:
                yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1


def names_with_two_meanings(sources: list[Source]) -> Iterator[str]:
    """Public classes and functions of one name, and files of one name, in several places."""
    places, files = defaultdict(list), defaultdict(list)
    for source in sources:
        files[source.path.rsplit("/", 1)[-1]].append(source.path)
        for node in source.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(source.path)
    for name, paths in sorted(places.items()):
        if len(paths) > 1 and name not in SAME_NAMES:
            yield f"{name} is defined in {' and '.join(paths)}: one meaning a name"
    for name, paths in sorted(files.items()):
        if len(paths) > 1 and name not in SAME_FILES:
            yield f"{' and '.join(paths)} share a file name"


def method_names(sources: list[Source]) -> Iterator[str]:
    """Names of methods as text outside of the places that choose by them."""
    for source in sources:
        if any(source.path.startswith(place) for place in METHOD_PLACES):
            continue
        tree = source.tree
        docstrings = _docstrings(tree)
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and METHODS.fullmatch(text) and id(node) not in docstrings:
                yield f"megalr/{source.path}:{node.lineno} names {text}: ask the layer"


def _docstrings(tree: ast.Module) -> set[int]:
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def patches_without_facts(sources: list[Source]) -> Iterator[str]:
    """Patches of DeepSpeed without version, gain, test and rule of removal in engine/patches.py."""
    facts = ""
    for source in sources:
        if source.path == "engine/patches.py":
            facts = ast.get_docstring(source.tree) or ""
    for source in sources:
        if re.fullmatch(r"engine/patch_\w+\.py", source.path):
            name = source.path.rsplit("/", 1)[-1]
            missing = [part for part in (name, "gain", "Test:", "Removal:") if part not in facts]
            if missing:
                yield f"megalr/engine/patches.py does not state {missing[0]!r}, for {source.path}"


def dialect(root: Path = ROOT) -> Iterator[str]:
    """Expressions that are not the field's English, in code and in user pages."""
    folders = ("megalr", "launchers", "tools", "docs")
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in (".py", ".md", ".sh", ".sbatch"):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
                found = TICS.search(line)
                if found:
                    yield f"{path.relative_to(root)}:{number} says {found.group()!r}"


def violations() -> list[str]:
    """All violations of the repository as it stands."""
    sources = package()
    rules = (
        deepspeed_outside_engine,
        rooms_without_a_contract,
        sizes,
        names_with_two_meanings,
        method_names,
        patches_without_facts,
    )
    return [line for rule in rules for line in rule(sources)] + list(dialect())


def counts() -> list[tuple[str, int]]:
    """The figures of docs/dev/architecture.md."""
    sources = package()
    training = [source for source in sources if source.room == "training"]
    named = [source for source in sources if _imports_of_deepspeed(source)]
    return [
        ("lines of the package", sum(source.lines for source in sources)),
        ("files of the package", len(sources)),
        ("rooms", len({source.room for source in sources} - {""})),
        ("lines of training/", sum(source.lines for source in training)),
        ("files of training/", len(training)),
        ("files that import deepspeed", len(named)),
        ("of these outside engine/", sum(source.room != "engine" for source in named)),
    ]


def main() -> int:
    """Print violations, or the counts; the exit code."""
    if sys.argv[1:] == ["--count"]:
        for name, number in counts():
            print(f"{number:8,}  {name}")
        return 0
    found = violations()
    print("\n".join(found) if found else "rules: all kept")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
