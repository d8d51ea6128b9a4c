"""Run the command line as ``python -m portlm``."""

from portlm.cli import main

main()
