# SPDX-License-Identifier: Apache-2.0
"""The time of a training step by the parts of a normalizer."""

import collections
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

ENTRY = "ENTRY"
# Part -> words in the name of an operation; the first match counts. A normalizer's parts
# have the names that cbn_jax gives them in every profiler.
PARTS = {
    "layers": r"/(Conv|Dense)(_\d+)?/",
    **{
        name: rf"/{name}/"
        for name in ("moments", "transport", "derivatives", "remember", "normalize")
    },
    "other of the norm": r"/(Norm|_\w+)_\d+",
    "optimizer": r"jit\(step\)/\w+$",
}
UNNAMED = "unnamed"
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = \S+ ([\w\-]+)\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")


def parts(step: Any, state: Any, arguments: tuple, steps: int = 5) -> dict[str, float]:
    """Milliseconds of a compiled step by part, summed over threads; consumes the state.

    Operations that the compiler added or left without a name are a separate part.
    """
    part_of = dict(_parts(step.as_text()))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, _ = step(state, *arguments)
            jax.block_until_ready(state)
        (path,) = Path(folder).rglob("*.xplane.pb")
        recorded = jax.profiler.ProfileData.from_file(str(path))
    total: collections.Counter[str] = collections.Counter()
    for plane in recorded.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in part_of:
                    total[part_of[event.name]] += event.duration_ns / 1e6 / steps
    return dict(total)


def computations(program: str) -> dict[str, list[str]]:
    """The instructions of every computation of a compiled program, the main one ``ENTRY``.

    Instructions are without their metadata, which may contain words of the program.
    """
    found: dict[str, list[str]] = {}
    name = None
    for line in program.splitlines():
        if header := _HEADER.match(line):
            name = ENTRY if header[1] else header[2]
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line.partition(", metadata={")[0])
    return found


def _parts(program: str) -> Iterator[tuple[str, str]]:
    """(operation, part) of a compiled program."""
    for line in program.splitlines():
        if found := _INSTRUCTION.match(line):
            name, kind = found.groups()
            named = re.search(r'op_name="([^"]*)"', line)
            if kind != "while":  # its body is counted separately
                yield name, _part(named[1] if named else "")


def _part(name: str) -> str:
    fitting = (part for part, pattern in PARTS.items() if re.search(pattern, name))
    return next(fitting, "other" if name else UNNAMED)
