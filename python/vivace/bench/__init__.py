"""`vivace bench`: measurements that a stranger can repeat with one command.

A run is a list of rows, each a flat dictionary with the case, the figures and the machine's facts, so that rows of
several files may be concatenated. cells.py says what is measured, timing.py how, peers.py against what, figures.py what
follows from the times, machine.py on what, output.py how it is written.
"""
