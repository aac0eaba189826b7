"""`maskflash doctor`: findings -> a line for each, and whether something is broken."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from maskflash.cli import terminal
from maskflash.doctor import examine


def run(args: Namespace) -> int:
    """Print the findings; 1 if something is broken, which a machine without a GPU is not."""
    with terminal.working("looking at this machine"):
        findings = examine()
    if args.json:
        terminal.print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            print(f"{'yes' if finding.works else 'no ':<4}{finding.name:<18}{finding.text}")
    return 1 if any(not finding.works and finding.name != "triton" for finding in findings) else 0
