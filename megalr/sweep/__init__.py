"""Many runs from one file: their plan, their execution on this machine, and their results.

In: a sweep file (a base run and grids), an output folder. Out: runs, and a table of their results.
Must not know: how a run trains; it starts the program that does, and reads the run's folder.
"""
