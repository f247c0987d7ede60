"""`python -m lsgd_jax` is the `lsgd` command."""

import sys

from lsgd_jax.cli import main

sys.exit(main())
