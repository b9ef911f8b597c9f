"""How likely is it that these counts came about by chance? Pearson's chi-square, without a library for it.

The bound of all tests here is 1e-6: one false alarm in a million runs, while a share that is wrong by a tenth is found with a few
thousand calls. Classes of which fewer than five are expected are put together, since the approximation fails for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LIMIT = 1e-6


def survival(x: float, freedom: int) -> float:
    """P(chi-square with so many degrees of freedom > x): the regularised upper incomplete gamma function Q(k/2, x/2)."""
    a, x = freedom / 2, x / 2
    if x <= 0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:  # the series of P converges quickly here
        term = total = 1 / a
        n = a
        while term > total * 1e-16:
            n += 1
            term *= x / n
            total += term
        return max(0.0, 1 - scale * total)
    b, c = x + 1 - a, 1e300  # and Lentz's continued fraction of Q there
    d = 1 / b
    value = d
    for i in range(1, 10_000):
        step = -i * (i - a)
        b += 2
        d = 1 / (step * d + b)
        c = b + step / c
        value *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return scale * value


def probability(counts: Sequence[float], shares: Sequence[float]) -> float:
    """Of counts at least so far from the shares, if the shares are right."""
    calls, whole = sum(counts), sum(shares)
    expected = [calls * share / whole for share in shares]
    if any(n for n, e in zip(counts, expected, strict=True) if e == 0):
        return 0.0
    pairs = [(n, e) for n, e in zip(counts, expected, strict=True) if e >= 5]
    rest = [(n, e) for n, e in zip(counts, expected, strict=True) if 0 < e < 5]
    if rest:
        pairs.append((sum(n for n, _ in rest), sum(e for _, e in rest)))
    if len(pairs) < 2:
        return 1.0
    return survival(sum((n - e) ** 2 / e for n, e in pairs), len(pairs) - 1)


def likeness(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """The probability of two sets of counts so different, if both come from the same shares."""
    names = sorted(name for name in {*a, *b} if a.get(name, 0) + b.get(name, 0) >= 10)
    of_a, of_b = sum(a.values()), sum(b.values())
    square = 0.0
    for name in names:
        both = (a.get(name, 0) + b.get(name, 0)) / (of_a + of_b)
        square += sum((n - whole * both) ** 2 / (whole * both) for n, whole in ((a.get(name, 0), of_a), (b.get(name, 0), of_b)))
    return survival(square, len(names) - 1) if len(names) > 1 else 1.0
