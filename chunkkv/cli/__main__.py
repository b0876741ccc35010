"""``python -m chunkkv.cli`` is ``chunkkv``."""

from chunkkv.cli import main

main()
