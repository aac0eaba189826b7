"""`python -m maskflash`: the same as the console script `maskflash`."""

import sys

from maskflash.cli import main

if __name__ == "__main__":
    sys.exit(main())
