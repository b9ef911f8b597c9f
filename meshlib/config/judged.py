"""What has the core against these rules?

The last word on a rule is the core's: it compiles it, and refuses what could never match, since a denial that never
fires is an open door. So it is asked when the file is read, by a plan that nobody uses, and what it says is told at the
line of the rule, for all services and not only for this process's own. What the types and `secure_vet.py` find is
found before, in better words and all at once; this is the net beneath them. A thousand rules take some milliseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, Final

from meshlib.errors import ConfigError

from . import secure_plan
from .policy import ServicePolicy
from .secure_policy import ProviderPolicy, ProxiesPolicy, RulePolicy
from .text import Path, Text

_OF_RULE: Final = re.compile(r'rule "([0-9]+)": (?:(?:when )?([a-z_]+)[^:]*: )?(.*)\Z', re.DOTALL)
_OF_PROVIDER: Final = re.compile(r'the provider "([a-z0-9-]+)": (.*)\Z', re.DOTALL)


# Nobody comes in by this plan.
_NO_ADMISSION: Final = {
    "in_flight": 1,
    "adaptive": None,
    "queue": 0.0,
    "target": 0.005,
    "interval": 0.1,
    "shares": [1.0, 1.0, 1.0, 1.0],
    "priorities": [],
    "probes": [],
}


def check(text: Text, services: Mapping[str, ServicePolicy], providers: Mapping[str, ProviderPolicy]) -> None:
    """Note what the core refuses. Rules of the system are judged once."""
    written = (rule for service in services.values() for rule in (*service.rules, *service.inbound.public_allow))
    rules = list({rule.place: rule for rule in written}.values())
    for line in _ask(rules, providers.values()):
        of_rule, of_provider = _OF_RULE.match(line), _OF_PROVIDER.match(line)
        place: Path = ()
        message = line
        if of_rule is not None:
            number, key, message = of_rule.groups()
            place = (*rules[int(number)].place, *([key] if key else []))
        elif of_provider is not None:
            name, message = of_provider.groups()
            place = ("secure", "jwt", name)
        message, _, hint = message.partition("; ")
        text.refuse(place, message, hint)


@lru_cache(maxsize=1024)
def expression_fault(expression: str) -> str:
    """What the core has against an expression for whole paths; "" if nothing. Its engine is linear, and Python's is no judge of it."""
    clauses: dict[str, Any] = {field.name: () for field in fields(RulePolicy)}
    clauses |= {"name": "", "action": "allow", "authorizer": "", "is_case_insensitive": False, "is_dry_run": False}
    clauses |= {"callers": ("*",), "path_regexes": (expression,)}
    found = _ask([RulePolicy(**clauses)], ())
    return found[0].partition(": paths: ")[2] or found[0] if found else ""


def _ask(rules: Iterable[RulePolicy], providers: Iterable[ProviderPolicy]) -> list[str]:
    from meshlib._native import core

    try:
        core.Gate().publish(json.dumps(asking(rules, providers)).encode(), 0.0)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def asking(rules: Iterable[RulePolicy], providers: Iterable[ProviderPolicy]) -> dict[str, Any]:
    """A server plan of all these rules, whosever they are. Each is judged by itself, so they are called by their numbers."""
    numbered = (replace(rule, name=str(number), authorizer="one" if rule.authorizer else "") for number, rule in enumerate(rules))
    return {
        "service": "everyone",
        "mode": "observe",
        "identity": "",
        "trust_domain": "",
        "paths": "canonical",
        "admission": _NO_ADMISSION,
        "rules": [secure_plan.rule(rule) for rule in numbered],
        "public_rules": [],
        "routes": [],
        "proxies": secure_plan.proxies(ProxiesPolicy()),
        "xfcc": "sanitize",
        "providers": [secure_plan.provider(provider) for provider in providers],
        "jwt_required": [],
        "rates": [],
        "record": False,
    }
