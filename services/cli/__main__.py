"""``python -m services.cli`` is ``chunkserve``."""

from services.cli import main

main()
