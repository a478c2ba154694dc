"""The ``megalr`` command; the programs in ``tools/`` and ``launchers/`` are its subcommands too.

In: the words of a command line. Out: an exit code and printed results; the work is done in the
rooms below. Must not know: how anything is computed. A module of this room imports the standard
library only before its command line has been parsed, so that ``--help`` answers at once.
"""
