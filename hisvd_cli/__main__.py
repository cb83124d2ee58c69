"""``python -m hisvd_cli``."""

from hisvd_cli.app import main

main()
