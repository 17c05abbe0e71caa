"""Frozen, slotted records without the cost of ``dataclasses``.

``import dataclasses`` pulls in ``inspect`` and costs more time than the way from the first line
of the command to the guest's first instruction may take. A :class:`Record` gives what we use of
it: fields from annotations, defaults, keyword arguments, no assignment afterwards, ``==``,
``repr`` and :meth:`Record.replace`. Type checkers see an ordinary frozen dataclass.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self, dataclass_transform
else:

    def dataclass_transform(**_kwargs):
        return lambda cls: cls


@dataclass_transform(frozen_default=True, kw_only_default=True)
class _RecordType(type):
    """Turns annotations into slots before the class is made (slots cannot come later)."""

    def __new__(mcs, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> _RecordType:
        own = tuple(space.get("__annotations__", ()))
        inherited = getattr(bases[0], "_fields", ()) if bases else ()
        defaults = dict(getattr(bases[0], "_defaults", {})) if bases else {}
        defaults.update((field, space.pop(field)) for field in own if field in space)
        space["__slots__"] = own
        space["_fields"] = inherited + own
        space["_defaults"] = defaults
        return super().__new__(mcs, name, bases, space)


class Record(metaclass=_RecordType):
    """Base of all records. A subclass may check its fields in ``__post_init__``."""

    if not TYPE_CHECKING:

        def __init__(self, **values):
            store = object.__setattr__
            for field in self._fields:
                if field in values:
                    store(self, field, values.pop(field))
                elif field in self._defaults:
                    store(self, field, self._defaults[field])
                else:
                    raise TypeError(f"{type(self).__name__}: {field} is missing")
            if values:
                raise TypeError(f"{type(self).__name__}: no field {', '.join(sorted(values))}")
            self.__post_init__()

        def __setattr__(self, name, value):
            raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")

        def __delattr__(self, name):
            raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be deleted")

    def __post_init__(self) -> None:
        """Checks the fields; raises what is wrong with them."""

    def _astuple(self) -> tuple[object, ...]:
        fields: tuple[str, ...] = getattr(self, "_fields")  # noqa: B009 (set by the metaclass)
        return tuple(getattr(self, field) for field in fields)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one."""
        fields: tuple[str, ...] = getattr(self, "_fields")  # noqa: B009 (set by the metaclass)
        values = {field: getattr(self, field) for field in fields}
        values.update(changes)
        return type(self)(**values)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, Record)
        return self._astuple() == other._astuple()

    def __hash__(self) -> int:
        return hash((type(self), self._astuple()))

    def __repr__(self) -> str:
        fields: tuple[str, ...] = getattr(self, "_fields")  # noqa: B009 (set by the metaclass)
        inner = ", ".join(f"{field}={getattr(self, field)!r}" for field in fields)
        return f"{type(self).__name__}({inner})"
