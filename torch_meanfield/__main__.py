"""``python -m torch_meanfield``."""

import sys

from torch_meanfield.command_line import main

if __name__ == "__main__":
    sys.exit(main())
