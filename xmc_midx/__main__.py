"""Layer 7. `python -m xmc_midx`: the command line."""

from xmc_midx.cli.app import main

main()
