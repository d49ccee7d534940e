"""`python -m kdlm`, which `torchrun -m kdlm` and `accelerate launch -m kdlm` start on every rank."""

import sys

from kdlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
