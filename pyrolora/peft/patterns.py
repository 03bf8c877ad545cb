"""Regular expressions out of a file, matched against names of modules in bounded time.

Python's matcher tries one way after the other and takes for ever on ``(.*)*x``. Here an expression
maps the set of positions in the name where it may begin to the set of those where it may end, so
that each position is looked at once; and the steps of one file are counted.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from re import _constants as kind  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from pyrolora.errors import CheckpointError
from pyrolora.files import shown

LONGEST = 100_000
"""Characters of a pattern: enough for an alternative per layer of a large network."""
MOST_STEPS = 5_000_000
"""Steps for all matches of one adapter: some seconds. A usual pattern takes hundreds."""

# Most patterns are a name, with dots as they are or escaped: `re` matches it in one pass.
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.|\\[-_])*\$?")
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    kind.CATEGORY_DIGIT: str.isdecimal,
    kind.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    kind.CATEGORY_SPACE: str.isspace,
    kind.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    kind.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    kind.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class Patterns:
    """A matcher of one file's patterns, which together take at most ``steps``."""

    def __init__(self, steps: int = MOST_STEPS) -> None:
        self._left = steps
        self._parsed: dict[str, list[Any]] = {}

    def whole(self, pattern: str, name: str) -> bool:
        """Return whether the pattern matches the whole name."""
        return self.match(pattern, name)

    def end(self, pattern: str, name: str) -> bool:
        """Return whether it matches the end of the name, from the start of one of its parts."""
        return self.match(pattern, name, _starts(name))

    def part(self, pattern: str, name: str) -> bool:
        """Return whether it matches consecutive parts of a dotted name."""
        ends = [place for place, character in enumerate(name) if character == "."]
        return self.match(pattern, name, _starts(name), [*ends, len(name)])

    def match(
        self, pattern: str, name: str, starts: Iterable[int] = (0,), ends: Iterable[int] = ()
    ) -> bool:
        """Return whether the pattern matches the name between a start and an end.

        It is one of ``starts`` and one of ``ends`` (none: the end of the name). ``^`` and ``$``
        stand for the ends of the name.

        Raises
        ------
        CheckpointError
            When the pattern is no regular expression, takes too long, or has what an expression
            over names does not need (back references, flags).
        """
        ends = set(ends) or {len(name)}
        parts = pattern.split("|")
        if len(pattern) <= LONGEST and all(map(_PLAIN.fullmatch, parts)):
            plain = [re.compile(part) for part in parts]
            return any(p.fullmatch(name, i, k) for p in plain for i in starts for k in ends)
        try:
            reached = self._ends(self._tree(pattern), name, frozenset(starts))
        except RecursionError as error:
            raise _refused(pattern, "it is nested too deeply") from error
        except (re.error, OverflowError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise _refused(pattern, f"it is no regular expression: {error}") from error
        return not ends.isdisjoint(reached)

    def _tree(self, pattern: str) -> list[Any]:
        if len(pattern) > LONGEST:
            raise _refused(pattern, f"it has {len(pattern):,} characters, more than {LONGEST:,}")
        if pattern not in self._parsed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a later Python may read it otherwise
                tree = _parser.parse(pattern)
            if tree.state.flags & ~re.UNICODE:
                raise _refused(pattern, "it sets flags")
            self._parsed[pattern] = list(tree)
        return self._parsed[pattern]

    def _ends(self, tree: Sequence[Any], name: str, starts: frozenset[int]) -> frozenset[int]:
        for operation, argument in tree:
            if not starts:
                break
            starts = self._after(operation, argument, name, starts)
        return starts

    def _after(self, op: Any, arg: Any, name: str, starts: frozenset[int]) -> frozenset[int]:
        """Return where an operation may end that begins at one of ``starts``."""
        self._left -= 1 + len(starts)
        if self._left < 0:
            raise CheckpointError(
                f"the patterns that name modules take too long to match {shown(name)}; write the "
                "names of the modules instead"
            )
        if op in (kind.LITERAL, kind.NOT_LITERAL, kind.ANY, kind.IN):
            return frozenset(i + 1 for i in starts if i < len(name) and _takes(op, arg, name[i]))
        if op is kind.BRANCH:
            return frozenset().union(*(self._ends(part, name, starts) for part in arg[1]))
        if op is kind.SUBPATTERN and not arg[1] and not arg[2]:
            return self._ends(arg[3], name, starts)
        if op in (kind.MAX_REPEAT, kind.MIN_REPEAT):
            least, most, body = arg
            return self._repeated(least, most, body, name, starts)
        if op is kind.AT and arg in (kind.AT_BEGINNING, kind.AT_BEGINNING_STRING):
            return starts & {0}
        if op is kind.AT and arg in (kind.AT_END, kind.AT_END_STRING):
            return starts & {len(name)}
        if op is kind.AT and arg in (kind.AT_BOUNDARY, kind.AT_NON_BOUNDARY):
            wanted = arg is kind.AT_BOUNDARY
            return frozenset(i for i in starts if _is_boundary(name, i) is wanted)
        if op in (kind.ASSERT, kind.ASSERT_NOT):
            wanted = op is kind.ASSERT
            return frozenset(i for i in starts if self._holds(arg[0], arg[1], name, i) is wanted)
        raise CheckpointError(
            f"a pattern that names modules has a {str(op).lower()}, which is not taken here; write "
            "the names of the modules instead"
        )

    def _holds(self, direction: int, inner: Any, name: str, place: int) -> bool:
        """Return whether a look-ahead or look-behind holds at a place."""
        if direction == 1:
            return bool(self._ends(inner, name, frozenset({place})))
        width, most = inner.getwidth()
        if width != most:  # Python refuses it, too
            raise ValueError("look-behind requires fixed-width pattern")
        return place >= width and place in self._ends(inner, name, frozenset({place - width}))

    def _repeated(
        self, least: int, most: int, body: Sequence[Any], name: str, starts: frozenset[int]
    ) -> frozenset[int]:
        """Return where repetitions of ``body`` may end.

        Positions only grow: after as many turns as the name is long, none is new.
        """
        for _ in range(min(least, len(name) + 1)):
            starts = self._ends(body, name, starts)
        reached = latest = starts
        for _ in range(min(most - least, len(name) + 1)):
            latest = self._ends(body, name, latest) - reached
            if not latest:
                break
            reached |= latest
        return reached


def _starts(name: str) -> list[int]:
    """Return the places at which a part of a dotted name may begin."""
    return [0, *(place + 1 for place, character in enumerate(name) if character == ".")]


def _is_boundary(name: str, place: int) -> bool:
    """Return whether a word begins or ends at a place."""
    sides = [name[i : i + 1] for i in (place - 1, place) if i >= 0]
    return [bool(c) and _CATEGORIES[kind.CATEGORY_WORD](c) for c in sides].count(True) == 1


def _takes(op: Any, arg: Any, character: str) -> bool:
    if op is kind.ANY:
        return character != "\n"
    if op is not kind.IN:
        return (ord(character) == arg) is (op is kind.LITERAL)
    negated = bool(arg) and arg[0][0] is kind.NEGATE
    return any(_is_in(item, part, character) for item, part in arg[negated:]) is not negated


def _is_in(op: Any, arg: Any, character: str) -> bool:
    if op is kind.LITERAL:
        return ord(character) == arg
    if op is kind.RANGE:
        return bool(arg[0] <= ord(character) <= arg[1])
    return _CATEGORIES[arg](character)


def _refused(pattern: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"modules are named by the pattern {shown(pattern)}, and {reason}; write the names of the "
        "modules instead"
    )
