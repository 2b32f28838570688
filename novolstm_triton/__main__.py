"""`python -m novolstm_triton`: the command line, which is `app/cli.py`."""

import sys

from novolstm_triton.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
