"""`maskflash compare`: two masks -> what each shows that the other hides, with a picture of the first pairs."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import asdict

from maskflash.cli import terminal
from maskflash.cli.masks import TOKENS, load
from maskflash.masks.compare import compare


def run(args: Namespace) -> int:
    """Print how the masks differ; the exit status is 1 if they do."""
    a, b = (load(text) for text in args.mask)
    named = max(a.tokens or 0, b.tokens or 0) or max(TOKENS, _reach(args.mask))
    q_len = args.q_len or args.kv_len or named
    with terminal.working("comparing"):
        found = compare(a.mask, b.mask, q_len, args.kv_len or q_len, batch=args.batch, heads=args.heads)
    if args.json:
        surplus = {name: only and only._asdict() for name, only in (("only_a", found.only_a), ("only_b", found.only_b))}
        terminal.print_json({"equivalent": bool(found), **asdict(found), **surplus})
        return 0 if found else 1
    text = str(found)
    try:
        text.encode(terminal.encoding())
    except UnicodeEncodeError:
        text = text.replace("■", "#").replace("·", ".")
    print(text)
    return 0 if found else 1


def _reach(texts: list[str]) -> int:
    """Twice the largest number that the masks name: fewer tokens might not reach to where windows of it differ."""
    return 2 * max((int(number) for text in texts for number in re.findall(r"\d+", text)), default=0)
