"""``megalr report`` as a program of a checkout: ``python tools/report.py --help``."""

from megalr.cli.reports import report_command
from megalr.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(report_command)
