"""`maskflash doctor`: findings -> a line for each, and whether something is broken."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from maskflash.cli import terminal
from maskflash.doctor import examine


def run(args: Namespace) -> int:
    """Print the findings; 1 if something is broken: no GPU, or no library of another engine, is nothing broken."""
    with terminal.working("looking at this machine"):
        findings = examine()
    if args.json:
        terminal.print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            print(f"{'yes' if finding.works else 'no ':<4}{finding.name:<18}{finding.text}")
    needed = (finding for finding in findings if finding.name != "triton" and not finding.name.startswith("engine "))
    return 0 if all(finding.works for finding in needed) else 1
