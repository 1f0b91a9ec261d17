"""`atlas-blocks bench`: correctness first, then every contender's speed in one run.

contenders.py   what runs: providers of the rule, its definition, other libraries
gate.py         their errors against float64; nothing is timed unless they pass
measure.py      one contender's time, FLOP and memory, taken in turn with the others
report.py       the table, the plot, what it ran on
kernels.py      `bench kernels`: which shapes, in what order, and the files it writes
"""
