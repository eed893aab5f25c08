"""`python -m retention` is the `retention` command of that Python."""

import sys

from retention.cli import main

sys.exit(main())
