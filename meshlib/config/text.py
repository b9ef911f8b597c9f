"""What does the file say, and on which line does it say it?

PyYAML gives the events (its C parser where there is one); the values are built here and not by a YAML constructor,
because a policy must not depend on surprises: a duplicate key is a mistake (last-one-wins hides a rule), tags
construct nothing, `no` and `on` are words, `1.10` in a label and `012` are not silently numbers of another kind,
aliases can't blow up. Lists become tuples, so that a document can't change after it was checked. Every key path
keeps its line.

It knows nothing of meshlib's keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from meshlib.errors import Problem

Path = tuple[str | int, ...]

_NULL: Final = re.compile(r"(?:|~|null|Null|NULL)\Z")
_TRUE: Final = re.compile(r"(?:true|True|TRUE)\Z")
_FALSE: Final = re.compile(r"(?:false|False|FALSE)\Z")
_INT: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,18})\Z")
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]{1,3})?\Z")
_STR_TAG: Final = "tag:yaml.org,2002:str"
_DEEPEST: Final = 32
_LARGEST: Final = 1_000_000
_PARSER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(slots=True)
class Text:
    """A parsed file: its value, the line of every key path, and what is wrong with it as YAML."""

    file: str
    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line_of(self, path: Path) -> int:
        """The line of a key path, or of the nearest part of it that exists; 1 for the whole file."""
        for length in range(len(path), 0, -1):
            line = self.lines.get(path[:length])
            if line is not None:
                return line
        return 1

    def refuse(self, path: Path, message: str, hint: str = "", *, line: int | None = None) -> None:
        """Note a mistake at a key path."""
        at = self.line_of(path) if line is None else line
        self.problems.append(Problem(self.file, at, dotted(path), masked(message), masked(hint)))


def dotted(path: Path) -> str:
    """A key path as people write it: `services.orders.route[0].match`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return masked(text) or "(file)"


def masked(text: str) -> str:
    """The same without what may be a password in a URL, which people also write where it doesn't belong."""
    return " ".join(_without_password(word) for word in text.split(" ")) if "://" in text else text


def _without_password(word: str) -> str:
    begin = word.find("://") + 3
    # Credentials end at the last "@", since a password may hold one; some systems take it in the query.
    if begin < 3 or max(word.rfind("@"), word.rfind("?")) < begin:
        return word
    end = len(word.rstrip("'\",;:)]}`"))
    return word[:begin] + "…" + word[end:]


def parse(text: str, file: str) -> Text:
    """Parse YAML. Syntax errors end the parsing with one problem; everything else is noted, and the parsing goes on."""
    result = Text(file)
    try:
        _Builder(result).build(text)
    except _StopError as stop:
        result.refuse((), str(stop), "a policy is one plain document", line=stop.line)
        result.value = None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        hint = 'an indentation or a quote is wrong at or above this line; "*" and other special characters need quotes'
        result.refuse((), f"not valid YAML: {message}", hint, line=1 if mark is None else mark.line + 1)
        result.value = None
    except yaml.YAMLError as error:
        result.refuse((), f"not valid YAML: {' '.join(str(error).split())}", "only printable UTF-8 text is allowed")
        result.value = None
    return result


class _StopError(Exception):
    """What must end the parsing."""

    def __init__(self, message: str, event: yaml.Event) -> None:
        super().__init__(message)
        self.line = _line(event)


def _line(event: yaml.Event) -> int:
    return 1 if event.start_mark is None else event.start_mark.line + 1


@dataclass(slots=True)
class _Open:
    """A mapping or list that is being built."""

    value: dict[str, Any] | list[Any]
    path: Path
    anchor: str | None
    size: int = 1
    key: str | None = None
    is_duplicate: bool = False


class _Builder:
    """Turns events into values with a stack, never by recursion: depth and size are bounded whatever the file holds."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._stack: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._documents = 0

    def build(self, source: str) -> None:
        for event in yaml.parse(source, Loader=_PARSER):
            if isinstance(event, yaml.DocumentStartEvent):
                self._documents += 1
                if self._documents > 1:
                    raise _StopError("a second document begins here; one file is one document", event)
            elif isinstance(event, yaml.ScalarEvent):
                self._scalar(event)
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in self._anchors:
                    raise _StopError(f'unknown alias "{event.anchor}"', event)
                value, size = self._anchors[event.anchor]
                self._add(value, size, event)
            elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                self._begin(event)
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                self._end(event)

    def _begin(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent) -> None:
        if len(self._stack) >= _DEEPEST:
            raise _StopError(f"nested deeper than {_DEEPEST} levels", event)
        self._refuse_tag(event, is_allowed=False)
        parent = self._stack[-1] if self._stack else None
        if parent is not None and isinstance(parent.value, dict) and parent.key is None:
            raise _StopError("a key must be a word, not a mapping or list", event)
        path = self._place(event)
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        self._stack.append(_Open({} if is_mapping else [], path, event.anchor))

    def _end(self, event: yaml.Event) -> None:
        done = self._stack.pop()
        value = tuple(done.value) if isinstance(done.value, list) else done.value
        if done.anchor is not None:
            self._anchors[done.anchor] = (value, done.size)
        self._add(value, done.size, event, is_placed=True)

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        top = self._stack[-1] if self._stack else None
        if top is not None and isinstance(top.value, dict) and top.key is None:
            self._key(top, event)
            return
        self._refuse_tag(event, is_allowed=event.tag in ("!", _STR_TAG))
        is_plain = event.tag is None and event.implicit[0]
        value = _plain(event.value) if is_plain else event.value
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, 1)
        self._add(value, 1, event)

    def _key(self, top: _Open, event: yaml.ScalarEvent) -> None:
        assert isinstance(top.value, dict)
        key = event.value
        line = _line(event)
        path = (*top.path, key)
        top.key = key
        top.is_duplicate = key in top.value
        if key == "<<" and event.implicit[0]:
            self._text.refuse(
                path,
                "merge keys are not supported",
                "write the keys out, or use an alias for the whole value",
                line=line,
            )
        elif top.is_duplicate:
            first = self._text.lines.get(path, line)
            self._text.refuse(path, f"the key stands here a second time (first: line {first})", "keep one of them", line=line)
        else:
            self._text.lines[path] = line

    def _place(self, event: yaml.Event) -> Path:
        """Where the value that begins here will stand. Its line is the key's, or its own in a list."""
        if not self._stack:
            return ()
        top = self._stack[-1]
        if isinstance(top.value, dict):
            assert top.key is not None
            return (*top.path, top.key)
        path = (*top.path, len(top.value))
        self._text.lines.setdefault(path, _line(event))
        return path

    def _add(self, value: Any, size: int, event: yaml.Event, *, is_placed: bool = False) -> None:
        if not self._stack:
            self._text.value = value
            return
        top = self._stack[-1]
        if not is_placed:
            if isinstance(top.value, dict) and top.key is None:
                raise _StopError("an alias can't be a key", event)
            self._place(event)
        top.size += size
        if top.size > _LARGEST:
            raise _StopError(f"more than {_LARGEST} values; aliases count each time", event)
        if isinstance(top.value, list):
            top.value.append(value)
            return
        assert top.key is not None
        if not top.is_duplicate and top.key != "<<":
            top.value[top.key] = value
        top.key = None

    def _refuse_tag(self, event: yaml.NodeEvent, *, is_allowed: bool) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None and not is_allowed:
            raise _StopError(f'the tag "{tag}" is not allowed', event)


def _plain(text: str) -> Any:
    """The value of an unquoted word: YAML 1.2's core schema without octal, hexadecimal, infinity and NaN."""
    if _NULL.match(text):
        return None
    if _TRUE.match(text):
        return True
    if _FALSE.match(text):
        return False
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    return text
