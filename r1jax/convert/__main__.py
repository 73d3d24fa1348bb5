"""`python -m r1jax.convert`."""

import sys

from r1jax.convert.command import main

sys.exit(main())
