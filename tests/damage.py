"""JSON with one field changed, removed, or of another type, for the tests of what files may claim."""

import copy
import json

from hypothesis import strategies as st


# What a field may hold in a file that is damaged, or was written to deceive; `...` stands for no such field.
VALUES = st.one_of(
    st.sampled_from([..., None, True, False, "", "12", "../other", [], {}, [1], [True, 1], {"a": 1}, [[]], [{}]]),
    st.sampled_from([-1, 0, 1, 2, 3, 1.5, 10**30, -(2**63), 1e308, float("nan"), float("inf"), "²", "\ud800", "a\0b"]),
    st.integers(-3, 40),
    st.text(max_size=8),
    st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3), max_size=2),
    st.lists(st.none() | st.integers() | st.text(max_size=3), max_size=3),
)


def places(value, path=()):
    """Paths to all that is in JSON: keys of dicts and indices of lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*path, key), *places(item, (*path, key)))]


def changed(value, place, new):
    """A copy of JSON with another value, or none for `...`, in one place."""
    value = copy.deepcopy(value)
    *above, last = place
    holder = value
    for key in above:
        holder = holder[key]
    if new is ...:
        del holder[last]
    else:
        holder[last] = new
    return value


def damages(value, among=None):
    """Strategy of copies of JSON that differ in one place, of those `among` whose path begins with one of these."""
    found = [place for place in places(value) if among is None or place[0] in among]
    return st.builds(changed, st.just(value), st.sampled_from(found), VALUES)


def write(path, value):
    """Write JSON, with whatever Python's writer lets pass."""
    path.write_text(json.dumps(value), encoding="utf-8")


def one_line(error):
    """Whether a message is one line that is not empty."""
    return str(error).strip() and "\n" not in str(error)
