"""PTX text, as Triton's compiler writes it -> parameters, registers, and blocks of statements between branches."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import PurePath
from typing import Final

from tests.ptx.faults import Unsupported

WIDTHS: Final = {"pred": 0, **{f"{sort}{bits}": bits // 8 for sort in "bsuf" for bits in (16, 32, 64)}}  # bytes
ALL_REGISTERS: Final = 65536  # of a block, each 4 bytes
_SKIPPED: Final = (
    *(".version", ".target", ".address_size", ".extern", ".global", ".pragma"),
    *(".minnctapersm", ".reqnctapercluster", ")"),
)
_GUARD: Final = re.compile(r"@(!?%\w+)\s+")
_PARAMETER: Final = re.compile(r"\.param\s.*?(\w+)(\[\d+\])?,?$")
_REGISTERS: Final = re.compile(r"\.reg\s+\.(\w+)\s+(%\D+)(?:<\d+>|\d+);")
_LOCAL: Final = re.compile(r"(?:\.reg\s+\.\w+\s+(\w+);)|(?:(\w+):)")
_TARGETS: Final = re.compile(r"([$\w]+):\s*\.branchtargets\s+(.*);")
_PLACE: Final = re.compile(r"([\w.-]+\.py):(\d+):\d+")
_ENDS: Final = ("bra", "brx", "ret", "exit")

Line = tuple[int, str, str]  # number, text, and the kernel's line that it comes from


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
    """Statements that run one after the other, then a branch, if any, and the numbers of the blocks it may lead to."""

    statements: list[Statement]
    branch: Statement | None = None
    targets: tuple[int, ...] = ()


@dataclass(slots=True)
class Program:
    """One kernel.

    Attributes:
        name: of its entry.
        lines: of the text.
        params: their names, in order.
        threads: in a block.
        registers: of a thread when the kernel starts, if it says so.
        kinds: prefix of registers -> their type: "%r" -> "b32".
        blocks: in the order of the text.
        files: number -> path, as `.file` has them.
    """

    name: str = ""
    lines: list[str] = field(default_factory=list)
    params: list[str] = field(default_factory=list)
    threads: int = 0
    registers: int | None = None
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
    tables: dict[str, list[str]] = {}
    for number, line, source in _whole(_renamed(list(_code(program)))):
        if found := _TARGETS.fullmatch(line):
            tables[found[1]] = split(found[2])
        elif found := re.fullmatch(r"([$\w]+):", line):
            labels[found[1]] = len(statements)
        elif not _declared(program, line):
            statements += [_statement(number, one.strip(), source) for one in line.split(";") if one.strip()]
    program.blocks = _blocks(statements, labels, tables)
    return program


def _whole(lines: Iterable[Line]) -> Iterator[Line]:
    """The lines of a table of targets as one."""
    head: Line | None = None
    for number, line, source in lines:
        if head is None and ".branchtargets" not in line:
            yield number, line, source
            continue
        head = (number, line, source) if head is None else (head[0], f"{head[1]} {line}", head[2])
        if line.endswith(";"):
            yield head
            head = None


def _renamed(lines: list[Line]) -> Iterator[Line]:
    """Lines without braces: what an inner pair of them declares gets a name of its own.

    { .reg .pred done; again: ... @!done bra again; }   ->   .reg .pred %done_1; $again_1: ... @!%done_1 bra $again_1;
    """
    depth, scope = 0, 0
    names: dict[str, str] = {}
    for place, (number, line, source) in enumerate(lines):
        if line in "{}":
            depth += 1 if line == "{" else -1
            scope += depth > 1
            names = _locals(lines[place + 1 :], scope) if line == "{" and depth > 1 else {}
            continue
        yield (
            number,
            re.sub(r"(?<![\w$%.])\w+", lambda word, now=names: now.get(word[0], word[0]), line) if names else line,
            source,
        )


def _locals(lines: list[Line], scope: int) -> dict[str, str]:
    """The registers and labels that are declared up to the closing brace, with their names outside."""
    found = (_LOCAL.fullmatch(line) for _, line, _ in takewhile(lambda one: one[1] != "}", lines))
    pairs = [(one[1], one[2]) for one in found if one]
    return {name or label: f"%{name}_{scope}" if name else f"${label}_{scope}" for name, label in pairs}


def _code(program: Program) -> Iterator[Line]:
    """Lines without comments, with their numbers and the places in the kernel that they come from."""
    source = ""
    for number, raw in enumerate(program.lines, 1):
        line, _, comment = (part.strip() for part in raw.partition("//"))
        if line.startswith(".section"):
            return
        if line.startswith(".loc"):
            source = _place(program, line, comment)
        elif line and not line.startswith((".file", *_SKIPPED)):
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
    elif found := re.match(r"\.maxnreg\s+(\d+)", line):
        program.registers = int(found[1])
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


def _blocks(statements: list[Statement], labels: dict[str, int], tables: dict[str, list[str]]) -> list[Block]:
    """Cut after every branch and before every label."""
    after = {place + 1 for place, one in enumerate(statements) if one.words[0] in _ENDS}
    cuts = sorted({0, len(statements), *labels.values(), *after})
    number = {start: n for n, start in enumerate(cuts)}
    blocks = []
    tables = {label: [label] for label in labels} | tables
    for start, stop in pairwise(cuts):
        block = Block(statements[start:stop])
        if block.statements[-1].words[0] in _ENDS:
            block.branch = block.statements.pop()
            if block.branch.words[0] in ("bra", "brx"):
                block.targets = tuple(number[labels[label]] for label in tables[block.branch.operands[-1]])
        blocks.append(block)
    return blocks
