"""What is the least that allows all of this?

From calls that were seen (caller, method, path) come rules that allow these calls and, but for generalised paths, no others. A path
becomes a template where it was recorded as one, and at a position where more than `most` different values were seen under the same
beginning; not where the configuration names a value literally, and not where a call was refused that the template would let in.
A variable of a rule is any one segment. Where that lets in what was refused, a regular expression for ids stands in the template's place.
Rules are put together only where that allows nothing more: the callers of a rule share all its methods and paths.

Calls without an identity make no rule: it could only be one for anybody. Calls whose tokens came from an issuer each time make a rule
that asks for a token of that issuer. The same record gives the same rules, in the same order.

It writes no YAML and knows no file: that is `meshlib suggest`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from .traffic import Kind, Observed, is_id

EXACT: Final = "exact"
TEMPLATE: Final = "template"
REGEX: Final = "regex"

# Different values at one position of paths that make it a variable.
MOST: Final = 50
# A longer pattern is refused by the core.
LONGEST_REGEX: Final = 1000

# A variable of a template, whatever it is called; and one for which only ids were seen. No segment has a slash in it.
ANY: Final = None
ID: Final = "/id"
Shape = tuple[str | None, ...]

# What the recorder takes for an id, but for the digit that tells long hex from a word: it would make this unreadable.
_IDS: Final = "(?:[0-9]+|[0-9A-Fa-f]{8,}|[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})"
_ID: Final = re.compile(_IDS)

# What a rule can't hold as it is: a star or a brace means something there, the others are never in a rule's path.
_ODD: Final = re.compile(r"[*{}?#\\%]|[^\x20-\x7e]")
_VARIABLE: Final = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*\}\Z")
# As the recorder calls it.
_RECORDED: Final = re.compile(r"\{id[0-9]*\}\Z")


@dataclass(frozen=True, slots=True, order=True)
class Pattern:
    """Which paths: `kind` is exact, template or regex (full match). `stands_for`: some of the values of a variable that was found."""

    kind: str
    text: str
    stands_for: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a rule allows, and the calls by which that was seen; the first and the last of them in Unix time."""

    callers: tuple[str, ...]
    methods: tuple[str, ...]
    paths: tuple[Pattern, ...]
    issuers: tuple[str, ...]
    rows: tuple[Observed, ...]

    @property
    def calls(self) -> int:
        return sum(row.count for row in self.rows)

    @property
    def first(self) -> float:
        return min(row.first for row in self.rows)

    @property
    def last(self) -> float:
        return max(row.last for row in self.rows)


def least(rows: Sequence[Observed], *, routes: Iterable[str] = (), literals: Iterable[str] = (), most: int = MOST) -> list[Rule]:
    """The rules for the calls of one service.

    `routes`: templates of the configuration, whose variables' names are kept. `literals`: paths that it names as they are.
    """
    wanted = [row for row in rows if row.is_served and row.kind.peer]
    keys = {_key(row.kind) for row in wanted}
    named = {route for route in routes if "{" in route}
    shapes = {_key(row.kind): shape_of(row.kind, named) for row in rows}
    paths: set[Shape] = {tuple(path.split("/")) for path in literals if path.startswith("/")}
    refused = {
        (row.kind.peer, row.kind.method, _key(row.kind)) for row in rows if not row.is_served and row.kind.protocol != "grpc"
    }
    refused -= {(row.kind.peer, row.kind.method, _key(row.kind)) for row in wanted}
    nowhere_served = {shapes[key] for _, _, key in refused if key not in keys}
    kept_out: set[Shape] = set()
    while True:
        found = _patterns({key: shapes[key] for key in keys}, nowhere_served, kept_out, sorted(named), paths, most)
        # What somebody else may do, was refused to this one: that only the finished rules tell.
        more = _let_in(wanted, refused, shapes, {key: shape for key, (_, shape) in found.items()}) - kept_out
        if not more:
            break
        kept_out |= more
    cells: dict[tuple[str, str, Pattern], list[Observed]] = {}
    for row in wanted:
        cells.setdefault((row.kind.peer, row.kind.method, found[_key(row.kind)][0]), []).append(row)
    return _together(cells)


def shape_of(kind: Kind, routes: Collection[str] = ()) -> Shape:
    """A path in segments, without the names of its variables. Of those of a route nobody knows what stood for them."""
    if not kind.is_template:
        return tuple(kind.path.split("/"))
    is_route = kind.path in routes
    return tuple(
        (ID if _RECORDED.match(part) and not is_route else ANY) if _VARIABLE.match(part) else part
        for part in kind.path.split("/")
    )


# ---------------------------------------------------------------------- paths

_Key = tuple[str, str, bool]  # protocol, path, is_template


def _key(kind: Kind) -> _Key:
    return kind.protocol, kind.path, kind.is_template


class _Node:
    """A position in the paths that begin alike. `is_named`: the configuration has it literally; otherwise calls were seen there."""

    __slots__ = ("children", "is_end", "is_named")

    def __init__(self) -> None:
        self.children: dict[str | None, _Node] = {}
        self.is_end = self.is_named = False

    def under(self, part: str | None) -> _Node:
        return self.children.setdefault(part, _Node())

    def merge(self, other: _Node) -> None:
        self.is_end |= other.is_end
        for part, child in other.children.items():
            self.under(part).merge(child)

    def lets_in(self, shape: Shape) -> bool:
        """Would rules for the paths from here on allow one of this shape? Its variables may be any id."""
        if not shape:
            return self.is_end
        part, rest = shape[0], shape[1:]
        if part is ANY or part == ID:
            ways = {ANY, ID, *(name for name in self.children if name and is_id(name))}
        else:
            ways = {part}
            if part:  # a variable stands for something, and not for nothing at the end of a path
                ways |= {ANY, ID} if _ID.fullmatch(part) else {ANY}
        return any(self.children[way].lets_in(rest) for way in ways if way in self.children)


def _patterns(
    keys: Mapping[_Key, Shape], refused: set[Shape], kept_out: set[Shape], routes: Sequence[str], literals: set[Shape], most: int
) -> dict[_Key, tuple[Pattern, Shape]]:
    """For each path that was seen the pattern by which it is allowed, and the shape of what that lets in."""
    root = _tree(shape for key, shape in keys.items() if key[0] != "grpc")
    for shape in literals:
        for node in _along(root, shape):
            node.is_named = True
    out = [*(shape for shape in refused if not root.lets_in(shape)), *kept_out]
    values: dict[Shape, tuple[str, ...]] = {}
    _generalise(root, (), most, out, values)
    names = {tuple(ANY if _VARIABLE.match(part) else part for part in route.split("/")): route for route in reversed(routes)}
    is_wide: dict[Shape, bool] = {}
    found = {}
    for key, shape in keys.items():
        if key[0] == "grpc":
            found[key] = Pattern(EXACT, key[1]), shape
            continue
        final, samples = _final(shape, root, values)
        wide = tuple(ANY if part == ID else part for part in final)
        if wide != final and final not in is_wide:
            is_wide[final] = not any(map(_tree([wide]).lets_in, out))
        final = wide if is_wide.get(final, True) else final
        found[key] = _written(final, samples, names), final
    return found


def _let_in(
    wanted: Iterable[Observed],
    refused: Iterable[tuple[str, str, _Key]],
    shapes: Mapping[_Key, Shape],
    found: Mapping[_Key, Shape],
) -> set[Shape]:
    """What was refused to a caller, and is let in by the rules although nothing that was seen of this caller is like it."""
    seen: dict[tuple[str, str], set[_Key]] = {}
    for row in wanted:
        if row.kind.protocol != "grpc":
            seen.setdefault((row.kind.peer, row.kind.method), set()).add(_key(row.kind))
    before = {who: _tree(shapes[key] for key in keys) for who, keys in seen.items()}
    after = {who: _tree(found[key] for key in keys) for who, keys in seen.items()}
    return {
        shapes[key]
        for peer, method, key in refused
        if (who := (peer, method)) in seen and after[who].lets_in(shapes[key]) and not before[who].lets_in(shapes[key])
    }


def _tree(shapes: Iterable[Shape]) -> _Node:
    root = _Node()
    for shape in shapes:
        _along(root, shape)[-1].is_end = True
    return root


def _along(root: _Node, shape: Shape) -> list[_Node]:
    """The nodes of a path, made where they are not there yet."""
    nodes = []
    for part in shape:
        root = root.under(part)
        nodes.append(root)
    return nodes


def _generalise(node: _Node, shape: Shape, most: int, kept_out: Sequence[Shape], values: dict[Shape, tuple[str, ...]]) -> None:
    """Put together what stands at one position with too many values, from the beginning of the paths to their ends.

    `kept_out`: what must not be let in that way, of shapes that begin like this one.
    """
    several = [part for part, child in node.children.items() if part and part != ID and not child.is_named]
    if len(several) > most:
        merged = _Node()
        parts = [*several, *(part for part in (ID, ANY) if part in node.children)]
        for part in parts:
            merged.merge(node.children[part])
        alone = _Node()
        alone.children[ANY] = merged
        if not any(alone.lets_in(rest) for rest in kept_out):
            node.children = {**{part: child for part, child in node.children.items() if part not in parts}, ANY: merged}
            values[*shape, ANY] = tuple(sorted(several)[:3])
    for here, child in node.children.items():
        here_only = _tree([(here,)])
        rest = [refused[1:] for refused in kept_out if refused and here_only.lets_in(refused[:1])]
        _generalise(child, (*shape, here), most, rest, values)


def _final(shape: Shape, root: _Node, values: Mapping[Shape, tuple[str, ...]]) -> tuple[Shape, tuple[str, ...]]:
    """What has become of a shape, and some of the values of a variable that was found in it."""
    samples: tuple[str, ...] = ()
    final: list[str | None] = []
    node = root
    for part in shape:
        found = part if part in node.children else ANY
        node = node.children[found]
        final.append(found)
        if found is ANY and (more := values.get(tuple(final))):
            samples = more
    return tuple(final), samples


def _written(shape: Shape, samples: tuple[str, ...], names: Mapping[Shape, str]) -> Pattern:
    if any(part is not None and ";" in part for part in shape):
        # The gate asks whether a path is allowed with its `;parameters` and without: one pattern must say yes to both.
        bare = tuple(part and part.partition(";")[0] for part in shape)
        return Pattern(REGEX, f"(?:{_expression(shape)}|{_expression(bare)})", samples)
    if ID in shape or any(part is not None and _ODD.search(part) for part in shape):
        return Pattern(REGEX, _expression(shape), samples)
    if ANY not in shape:
        return Pattern(EXACT, "/".join(part or "" for part in shape))
    if known := names.get(shape):
        return Pattern(TEMPLATE, known, samples)
    names_left = iter(["{id}", *(f"{{id{number}}}" for number in range(2, len(shape) + 1))])
    return Pattern(TEMPLATE, "/".join(next(names_left) if part is None else part for part in shape), samples)


def _expression(shape: Shape) -> str:
    """A regular expression for these paths and no others. Only punctuation of ASCII may be escaped there."""
    return "/".join(
        "[^/]+" if part is ANY else _IDS if part == ID else re.sub(r"[\\.+*?()|\[\]{}^$#&~-]", r"\\\g<0>", part) for part in shape
    )


# ---------------------------------------------------------------------- rules


def _together(cells: Mapping[tuple[str, str, Pattern], list[Observed]]) -> list[Rule]:
    """Cells (caller, method, path) in rules that cover them, and nothing beside them."""
    methods: dict[tuple[str, Pattern, tuple[str, ...]], set[str]] = {}
    for (peer, method, pattern), rows in cells.items():
        methods.setdefault((peer, pattern, _issuers(rows)), set()).add(method)
    paths: dict[tuple[str, tuple[str, ...], tuple[str, ...]], set[Pattern]] = {}
    for (peer, pattern, issuers), used in methods.items():
        paths.setdefault((peer, _in_order(used), issuers), set()).add(pattern)
    callers: dict[tuple[tuple[str, ...], tuple[Pattern, ...], tuple[str, ...]], set[str]] = {}
    for (peer, used_methods, issuers), patterns in paths.items():
        callers.setdefault((used_methods, tuple(sorted(patterns)), issuers), set()).add(peer)
    rules = []
    for (used_methods, used_paths, issuers), peers in callers.items():
        rows = [row for peer in peers for method in used_methods for path in used_paths for row in cells[peer, method, path]]
        rules.append(Rule(tuple(sorted(peers)), used_methods, used_paths, issuers, tuple(rows)))
    return sorted(rules, key=lambda rule: (rule.callers, rule.paths, rule.methods, rule.issuers))


def _issuers(rows: Iterable[Observed]) -> tuple[str, ...]:
    """Whose tokens came with these calls, if one came with each."""
    issuers = {row.kind.issuer for row in rows}
    return () if "" in issuers else tuple(sorted(issuers))


_ORDER: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def _in_order(methods: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(methods, key=lambda method: (_ORDER.index(method) if method in _ORDER else len(_ORDER), method)))
