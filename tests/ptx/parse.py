"""PTX text, as Triton's compiler writes it -> parameters, registers, and blocks of statements between branches."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePath
from typing import Final

from tests.ptx.faults import Unsupported

WIDTHS: Final = {"pred": 0, **{f"{sort}{bits}": bits // 8 for sort in "bsuf" for bits in (16, 32, 64)}}  # bytes
_SKIPPED: Final = (
    *(".version", ".target", ".address_size", ".extern", ".global", ".pragma"),
    *(".minnctapersm", ".maxnreg", ".reqnctapercluster", ")"),
)
_GUARD: Final = re.compile(r"@(!?%p\d+)\s+")
_PARAMETER: Final = re.compile(r"\.param\s.*?(\w+)(\[\d+\])?,?$")
_REGISTERS: Final = re.compile(r"\.reg\s+\.(\w+)\s+(%\D+)<\d+>;")
_PLACE: Final = re.compile(r"([\w.-]+\.py):(\d+):\d+")
_ENDS: Final = ("bra", "ret", "exit")


@dataclass(frozen=True, slots=True)
class Statement:
    """One instruction.

    Attributes:
        line: of the PTX, from 1.
        text: as it stands there.
        source: "file.py:88", the kernel's line that it was compiled from; "" where that is not told.
        words: "setp.lt.s32" as ("setp", "lt", "s32").
        operands: their texts; vectors keep their braces, addresses their brackets.
        guard: the predicate that lets it run, as "%p3" or "!%p3".
    """

    line: int
    text: str
    source: str
    words: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None = None


@dataclass(slots=True)
class Block:
    """Statements that run one after the other, then a branch, if any, and the number of the block that it leads to."""

    statements: list[Statement]
    branch: Statement | None = None
    target: int | None = None


@dataclass(slots=True)
class Program:
    """One kernel.

    Attributes:
        name: of its entry.
        lines: of the text.
        params: their names, in order.
        threads: in a block.
        kinds: prefix of registers -> their type: "%r" -> "b32".
        blocks: in the order of the text.
        files: number -> path, as `.file` has them.
    """

    name: str = ""
    lines: list[str] = field(default_factory=list)
    params: list[str] = field(default_factory=list)
    threads: int = 0
    kinds: dict[str, str] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def width(self, register: str) -> int:
        """Bytes of a register, 0 for a predicate.

        Raises:
            Unsupported: it is not declared.
        """
        kind = self.kinds.get(re.sub(r"\d+$", "", register))
        if kind is None:
            raise Unsupported(f"register {register}")
        return WIDTHS[kind]

    def place(self, statement: Statement) -> str:
        """Where a statement stands, in the PTX and in the kernel."""
        words = f"{self.name}, PTX line {statement.line}: {statement.text}"
        if not statement.source:
            return words
        file, _, number = statement.source.rpartition(":")
        path = next((path for path in self.files.values() if PurePath(path).name == file), file)
        text = linecache.getline(path, int(number)).strip()
        return f"{words}\n    from {statement.source}{': ' if text else ''}{text}"


def parse(text: str) -> Program:
    """Read the one kernel of a module."""
    program = Program(lines=text.splitlines())
    program.files = {number: path for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"(.*)"', text, re.MULTILINE)}
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for number, line, source in _code(program):
        if found := re.fullmatch(r"([$\w]+):", line):
            labels[found[1]] = len(statements)
        elif not _declared(program, line):
            statements += [_statement(number, one.strip(), source) for one in line.split(";") if one.strip()]
    program.blocks = _blocks(statements, labels)
    return program


def _code(program: Program) -> Iterator[tuple[int, str, str]]:
    """Lines without comments, with their numbers and the places in the kernel that they come from."""
    source = ""
    for number, raw in enumerate(program.lines, 1):
        line, _, comment = (part.strip() for part in raw.partition("//"))
        if line.startswith(".section"):
            return
        if line.startswith(".loc"):
            source = _place(program, line, comment)
        elif line and line not in "{}" and not line.startswith((".file", *_SKIPPED)):
            yield number, line, source


def _place(program: Program, line: str, comment: str) -> str:
    """The kernel's own line: the last one where others were inlined into it, as the comment tells."""
    if places := _PLACE.findall(comment):
        return ":".join(places[-1])
    _, file, number, *_ = line.split()
    return f"{PurePath(program.files.get(file, file)).name}:{number}"


def _declared(program: Program, line: str) -> bool:
    """Whether a line declares something; the program then knows it."""
    if found := re.match(r"\.visible \.entry (\w+)\(", line):
        program.name = found[1]
    elif found := _PARAMETER.match(line):
        program.params.append(found[1])
    elif found := re.match(r"\.(?:req|max)ntid\s+(\d+)", line):
        program.threads = int(found[1])
    elif found := _REGISTERS.match(line):
        program.kinds[found[2]] = found[1]
    elif line.startswith("."):
        raise Unsupported(f"directive {line}")
    else:
        return False
    return True


def _statement(line: int, text: str, source: str) -> Statement:
    guard = _GUARD.match(text)
    bare = text[guard.end() :] if guard else text
    head, *rest = bare.split(None, 1)
    return Statement(line, text, source, tuple(head.split(".")), tuple(split(*rest)), guard[1] if guard else None)


def split(text: str = "") -> list[str]:
    """What stands between the commas that are in no bracket."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _blocks(statements: list[Statement], labels: dict[str, int]) -> list[Block]:
    """Cut after every branch and before every label."""
    after = {place + 1 for place, one in enumerate(statements) if one.words[0] in _ENDS}
    cuts = sorted({0, len(statements), *labels.values(), *after})
    number = {start: n for n, start in enumerate(cuts)}
    blocks = []
    for start, stop in pairwise(cuts):
        block = Block(statements[start:stop])
        if block.statements[-1].words[0] in _ENDS:
            block.branch = block.statements.pop()
            if block.branch.words[0] == "bra":
                block.target = number[labels[block.branch.operands[0]]]
        blocks.append(block)
    return blocks
