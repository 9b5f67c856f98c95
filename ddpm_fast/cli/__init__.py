"""The command line: ``ddpm-fast demo | train | sample | eval | doctor``, also ``python -m ddpm_fast``.

app.py holds the commands' options and help, one module a command does the work and is imported when it is needed.
"""

from ddpm_fast.cli.app import main

__all__ = ["main"]
