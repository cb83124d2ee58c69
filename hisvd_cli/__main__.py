"""``python -m hisvd_cli``."""

from hisvd_cli.cli.app import main

main()
