"""What would a fleet do that is larger than this machine? The parts of `benchmarks/simulate.py`; begin to read there.

plan.py         a user's configuration as the engines get it, with what a scenario changes
world.py        the virtual clock, endpoints with queues, callers with engines
stage.py        one service of so many endpoints and callers, and the figures
scenarios.py    what happens
catalogue.py    which scenarios there are, and what must hold
report.py       the balancers side by side, and the verdicts
"""
