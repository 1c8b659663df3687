"""`python -m xlstm_distill` is the command `xlstm-distill`."""

import sys

from .cli import main

sys.exit(main())
