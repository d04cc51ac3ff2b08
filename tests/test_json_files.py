"""JSON of others: its declared type, and the names of files in it."""

import os
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, TypedDict

import pytest
from damage import VALUES, one_line
from hypothesis import given
from hypothesis import strategies as st

from peft_edit.json_files import inside, mismatch, read_json


class Part(TypedDict):
    rows: int
    file: str


class Optional(TypedDict, total=False):
    data: dict[str, float | None] | None


class Whole(Optional):
    kind: Literal["a", "b"] | None
    parts: list[Part]
    complete: bool


GOOD = {"kind": "a", "parts": [{"rows": 1, "file": "x", "more": 1}], "complete": True, "data": {"x": 1, "y": 0.5}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"kind": None, "parts": [], "data": None}, None),
        ({"another": object()}, None),
        ({"data": {"x": 10**300, "y": float("nan")}}, None),
        ({"kind": "c"}, "kind must be one of 'a', 'b' or null, got 'c'"),
        ({"kind": []}, "kind must be one of 'a', 'b' or null, got []"),
        ({"complete": 1}, "complete must be true or false, got 1"),
        ({"parts": {}}, "parts must be a list, got {}"),
        ({"parts": [{"rows": 1, "file": "x"}, 5]}, "parts[1] must be an object, got 5"),
        ({"parts": [{"rows": "12", "file": "x"}]}, "parts[0].rows must be an integer, got '12'"),
        ({"parts": [{"rows": True, "file": "x"}]}, "parts[0].rows must be an integer, got True"),
        ({"parts": [{"rows": 12.0, "file": "x"}]}, "parts[0].rows must be an integer, got 12.0"),
        ({"parts": [{"rows": 2**63, "file": "x"}]}, f"parts[0].rows must be an integer, got {2**63}"),
        ({"parts": [{"rows": 1}]}, "no parts[0].file"),
        ({"data": []}, "data must be an object or null, got []"),
        ({"data": {"x": "1"}}, "data['x'] must be a number or null, got '1'"),
        ({"data": {"x": 10**400}}, "data['x'] must be a number or null, got 1" + "0" * 79),
    ],
)
def test_what_differs_from_a_declared_type(changes, problem):
    assert mismatch(GOOD | changes, Whole) == problem


@given(VALUES, st.sampled_from([Whole, Part, Any, int, float, str, bool, list[int], dict[str, Part], str | None]))
def test_any_value_is_compared(value, declared):
    found = mismatch(value, declared)
    assert found is None or one_line(found)
    if declared is int and found is None:
        assert type(value) is int


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "is bad (Expecting"),
        (b'{"rows": 1, "file": "x", "\\ud800": 1}', "is bad ('utf-8' codec can't encode"),
        (b"\xff", "is bad ('utf-8' codec"),
        (b"[" * 100_000, "is bad (maximum recursion"),
        (b"1" * 10_000, "is bad (Exceeds the limit"),
        (b"[]", "is bad (it must be an object, got [])"),
        (b"{}", "is bad (no file)"),
        (None, "there is no file"),
        (Path, "cannot be read (Is a directory)"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, problem):
    path = tmp_path / "x.json"
    if content is Path:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_json(path, Part, "bad", "mend it")
    assert problem in str(error.value) and str(path) in str(error.value) and str(error.value).endswith(": mend it")
    assert one_line(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("model.safetensors", "model.safetensors"), ("sub/m.x", "sub/m.x"), ("./a//b/.", "a/b"), ("..a/.b", "..a/.b")],
)
def test_names_below_the_folder(name, expected):
    assert inside(name, "index") == expected


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "sub/../../x", "a/..", "/x", "//x/y", "C:x", "C:\\x", "..\\x", "a\\..\\..\\x", "\\x"),
        *("a\0b", "a\nb", "\ud800", "x" * 256, "é" * 128, None, 5, True, ["x"], {"x": "y"}),
    ],
)
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ValueError, match=r"^index names the file .*, which is none below its folder: ") as error:
        inside(name, "index")
    assert one_line(error.value)


@given(st.one_of(VALUES, st.text(alphabet="./\\:aC~\0é", max_size=12)))
def test_no_name_leads_out_of_the_folder(name):
    try:
        found = inside(name, "index")
    except ValueError as error:
        assert one_line(error)
        return
    for base, join in (("/base", os.path.join), ("C:\\base", lambda *parts: str(PureWindowsPath(*parts)))):
        path = join(base, found)
        assert path.startswith(base) and ".." not in PureWindowsPath(path).parts and path != base
