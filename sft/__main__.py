"""`python -m sft` is `sft`."""

import sys

from sft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
