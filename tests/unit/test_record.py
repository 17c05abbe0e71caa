"""Records behave like frozen, slotted dataclasses."""

from __future__ import annotations

import pytest

from microvm._record import Record


class Point(Record):
    x: int
    y: int = 2


class Point3(Point):
    z: int = 3

    def __post_init__(self) -> None:
        if self.z < 0:
            raise ValueError("z")


def test_record_fields_and_defaults_are_set() -> None:
    assert (Point(x=1).x, Point(x=1).y) == (1, 2)


def test_record_inherits_fields_and_defaults() -> None:
    point = Point3(x=1, z=5)
    assert (point.x, point.y, point.z) == (1, 2, 5)


def test_record_assignment_raises() -> None:
    with pytest.raises(AttributeError, match="frozen"):
        Point(x=1).x = 3  # type: ignore[misc]


def test_record_has_no_dict() -> None:
    assert not hasattr(Point3(x=1), "__dict__")


@pytest.mark.parametrize("values", [{}, {"x": 1, "q": 2}])
def test_record_wrong_fields_raise(values: dict[str, int]) -> None:
    with pytest.raises(TypeError):
        Point(**values)


def test_record_replace_checks_the_copy() -> None:
    point = Point3(x=1)
    assert point.replace(y=7) == Point3(x=1, y=7)
    with pytest.raises(ValueError, match="z"):
        point.replace(z=-1)


def test_record_equality_is_by_type_and_value() -> None:
    assert Point(x=1) == Point(x=1)
    assert hash(Point(x=1)) == hash(Point(x=1))
    assert Point(x=1) != Point3(x=1)
    assert repr(Point(x=1)) == "Point(x=1, y=2)"
