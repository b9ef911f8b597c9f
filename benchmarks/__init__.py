"""How fast is it, and compared with what? `python -m benchmarks --help`; README.md says what each number means.

One script per question. Each starts real peers on free loopback ports and measures every mode in a process of its own. Nothing of
the package imports this, and nothing here is a test of correctness: a wrong answer ends a run, a slow one is a number.
"""
