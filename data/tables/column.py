"""A column of a table: what its values are, and its values as numbers, as codes of texts, or as moments.

A column is numeric if all its values are numbers, and of texts if none is. A mixture is refused until the file says which of
both it is, since a guess would be silently wrong for one of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpo.data.files import BadFile
from hpo.data.floats import MOST_WHOLE, first_beyond, lost_digits, said_of
from hpo.data.names import in_order
from hpo.data.tables.frame import Frame

Kind = Literal["numbers", "texts", "flags", "dates", "mixed", "empty", "other"]
Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
COMMA = r"[+-]?[0-9]+(,[0-9]+)+"  # decimal, or between thousands
INFINITE = r"^[+-]?(?i:inf|infinity)$"
_CLOCK = r"([T ]+[0-9]{1,2}:[0-9]{2}.*)?$"
DATE = rf"^([0-9]{{4}}[-/.][0-9]{{1,2}}[-/.][0-9]{{1,2}}|[0-9]{{1,2}}[-/.][0-9]{{1,2}}[-/.]([0-9]{{4}}|[0-9]{{2}})){_CLOCK}"
#: Names of columns that number rows, in lower case without separators.
ID_NAMES = ("id", "ids", "index", "idx", "uuid", "guid", "key", "rowid", "rownumber", "unnamed0")
FEW = 10  # rows in which all values may differ, or count up, by chance


Use = Literal["input", "target", "channel", "key"]
#: By use of a column: how it is left out, and how its texts may stay.
MENDS: dict[Use, tuple[str, str]] = {
    "input": ("write drop = [{name!r}]", "write categorical = [{name!r}]"),
    "target": ("name another target", 'write task = "classification"'),
    "channel": ("leave the column out of channels", "leave the column out of channels"),
    "key": ("name another column", "name a column of numbers or ISO dates"),
}


@dataclass(frozen=True, eq=False)
class Column:
    """A column of a frame."""

    frame: Frame
    index: int  # its place among the columns, from 0
    use: Use = "input"  # for the mends in messages

    @property
    def name(self) -> str:
        return self.frame.names[self.index]

    def bad(self, cause: str, row: int | None = None) -> BadFile:
        """Return an error that names the column, and a row if one is given."""
        return self.frame.bad(cause, row, self.index)

    # --- what it holds ------------------------------------------------------------------------------------------------

    @cached_property
    def values(self) -> Any:
        """The values as a pyarrow.Array, null where one is missing. Texts are stripped."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.types as types

        found = self.frame.arrays[self.index]
        if types.is_dictionary(found.type):
            found = found.dictionary_decode()
        if types.is_large_string(found.type) or types.is_string_view(found.type):
            found = found.cast(pa.string())
        if types.is_string(found.type):
            found = pc.utf8_trim_whitespace(found)
            is_missing = pc.is_in(pc.utf8_lower(found), pa.array(sorted(self.frame.missing), pa.string()))
            return pc.if_else(is_missing, pa.scalar(None, pa.string()), found)
        if types.is_floating(found.type):
            return pc.if_else(pc.is_nan(found), pa.scalar(None, found.type), found)
        return found.cast(pa.float64()) if types.is_decimal(found.type) else found

    @cached_property
    def missing(self) -> Mask:
        """Where a value is missing, bool [N]."""
        found: Mask = self.values.is_null().to_numpy(zero_copy_only=False)
        return found

    @cached_property
    def kind(self) -> Kind:
        """What the values are, by their type or, if they are texts, by all of them."""
        import pyarrow.types as types

        kind = self.values.type
        if self.missing.all():
            return "empty"
        if types.is_boolean(kind):
            return "flags"
        if types.is_integer(kind) or types.is_floating(kind):
            return "numbers"
        if types.is_temporal(kind):
            return "dates"
        if not types.is_string(kind):
            return "other"
        numbers = self._are_numbers
        if (numbers | self.missing).all():
            return "numbers"
        if numbers.any():
            return "mixed"
        return "dates" if (self._match(DATE) | self.missing).all() else "texts"

    @cached_property
    def _are_numbers(self) -> Mask:
        return self._match(NUMBER) | self._match(INFINITE)

    def _match(self, pattern: str) -> Mask:
        import pyarrow.compute as pc

        found = pc.fill_null(pc.match_substring_regex(self.values, pattern), False)
        return found.to_numpy(zero_copy_only=False).astype(bool)  # type: ignore[no-any-return]

    def shown(self, row: int) -> str:
        """Return a value for a message, in quotes if it is a text."""
        value = self.values[row].as_py()
        return repr(value) if isinstance(value, str) else str(value)

    # --- its values ---------------------------------------------------------------------------------------------------

    def numbers(self) -> Floats:
        """Return the values as numbers, NaN where one is missing; BadFile for a text, an infinity, or lost digits."""
        self.refuse_dates()
        values = self._as_floats()
        self._refuse_the_extreme(values)
        return values

    def _as_floats(self) -> Floats:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.types as types

        found = self.values
        if self.kind == "other":
            raise self.bad(f"holds values of type {found.type}; {self._left_out}")
        if types.is_string(found.type):
            wrong = np.flatnonzero(~self._are_numbers & ~self.missing)
            if len(wrong):
                raise self._no_number(int(wrong[0]))
            found = pc.utf8_ltrim(found, characters="+")
        values: Floats = found.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
        return values

    def _refuse_the_extreme(self, values: Floats) -> None:
        """Raise BadFile for values that float32, which models compute with, cannot hold."""
        row = first_beyond(values)
        if row is not None:
            raise self.bad(f"{self.shown(row)} {said_of(values[row])}", row)
        if why := lost_digits(values):
            raise self.bad(f"{why}, or {self._left_out}")

    def _no_number(self, row: int) -> BadFile:
        """Return the error for a text in a column of numbers."""
        value, as_text = self.values[row].as_py(), MENDS[self.use][1].format(name=self.name)
        if re.fullmatch(COMMA, value):
            return self.bad(f"{value!r} has a comma; write numbers with a decimal point alone, or {as_text}", row)
        count = int(self._are_numbers.sum())
        if not count:
            return self.bad(f"{value!r} is not a number, as the rest of this column; {as_text}", row)
        return self.bad(
            f"{value!r} is not a number; the column has {count} number{'s' * (count > 1)}; correct it, name the text in "
            f"missing_values if it stands for a missing value, or {as_text}",
            row,
        )

    def codes(self) -> tuple[Codes, list[str]]:
        """Return the number of each value among its different texts, -1 where one is missing, and these texts by number."""
        import pyarrow as pa
        import pyarrow.types as types

        found = self.values
        if self.kind == "other":
            raise self.bad(f"holds values of type {found.type}; {self._left_out}")
        if types.is_floating(found.type):
            values = found.to_numpy(zero_copy_only=False)
            known = values[~self.missing]
            if np.isinf(known).any():
                row = int(np.isinf(values).argmax())
                raise self.bad(f"{self.shown(row)} {said_of(values[row])}", row)
            are_whole = (known == np.trunc(known)).all() and (np.abs(known) < MOST_WHOLE).all()
            found = found.cast(pa.int64()) if are_whole else found
        encoded = found.cast(pa.string()).dictionary_encode()
        numbers = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        names = encoded.dictionary.to_pylist()
        try:
            in_order(names)
        except ValueError as error:
            raise self.bad(str(error)) from error
        return numbers, names

    def texts(self) -> list[str]:
        """Return the values as free texts, also those that stand for a missing value elsewhere; BadFile for an empty one."""
        import pyarrow.types as types

        found = self.frame.arrays[self.index]
        if not (types.is_string(found.type) or types.is_large_string(found.type) or types.is_string_view(found.type)):
            raise self.bad(f"holds values of type {found.type}; name a column of texts")
        values: list[str] = found.to_pylist()
        for row, value in enumerate(values):
            if not (value or "").strip():
                raise self.bad("holds no text; write one, or remove the row", row)
        return values

    def moments(self) -> npt.NDArray[Any]:
        """Return whole or real numbers to sort by, of dates those since 1970; BadFile if one is missing or not a date."""
        import pyarrow as pa
        import pyarrow.types as types

        self.refuse_missing("give each row its time")
        if self.kind != "dates":
            try:
                return self.values.cast(pa.int64()).to_numpy()  # type: ignore[no-any-return]
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                return self._finite()
        if types.is_temporal(self.values.type):  # all of one unit
            whole = pa.int32() if self.values.type.bit_width == 32 else pa.int64()
            return self.values.view(whole).to_numpy().astype(np.int64)  # type: ignore[no-any-return]
        try:
            moments = self.values.cast(pa.timestamp("us"))
        except pa.ArrowInvalid:  # they may have a time zone
            moments = self._with_zone()
        return moments.cast(pa.int64()).to_numpy()  # type: ignore[no-any-return]

    def _finite(self) -> Floats:
        values = self._as_floats()
        if np.isinf(values).any():
            raise self.bad("is infinite; write a time", int(np.isinf(values).argmax()))
        return values

    def _with_zone(self) -> Any:
        import pyarrow as pa

        try:
            return self.values.cast(pa.timestamp("us", "UTC"))
        except pa.ArrowInvalid as error:
            raise self.bad(
                f"its dates, such as {self.shown(0)}, are not all ISO 8601; write 2026-12-31 or 2026-12-31 23:59:59", 0
            ) from error

    # --- what is refused ----------------------------------------------------------------------------------------------

    def refuse_missing(self, mend: str) -> None:
        """Raise BadFile, which names the first row, if a value is missing."""
        rows = np.flatnonzero(self.missing)
        if len(rows):
            more = f", as {len(rows) - 1} other{'s' * (len(rows) > 2)} of this column" if len(rows) > 1 else ""
            written = str(self.frame.arrays[self.index][int(rows[0])].as_py() or "").strip()
            or_else = f'; if {written!r} is a value, write missing_values = [""]' if written not in ("", "nan") else ""
            raise self.bad(f"is missing{more}; {mend}{or_else}", int(rows[0]))

    def refuse_dates(self) -> None:
        """Raise BadFile if the values are dates."""
        if self.kind == "dates":
            row = int(np.flatnonzero(~self.missing)[0])
            split = f"; for a split by time write time = {self.name!r}" if self.use == "input" else ""
            raise self.bad(
                f"{self.shown(row)} is a date, which no model takes; make numbers of it, such as days since a day, or "
                f"{self._left_out}{split}",
                row,
            )

    def refuse_unclear(self) -> None:
        """Raise BadFile for an undeclared column that is neither numbers nor categories, or that numbers the rows."""
        self.refuse_dates()
        if self.kind == "empty":
            raise self.bad(f"has no values; {self._left_out}")
        if self.kind == "mixed":
            row = int(np.flatnonzero(~self._are_numbers & ~self.missing)[0])
            raise self._no_number(row)
        commas = self._match(f"^{COMMA}$") if self.kind == "texts" else self.missing
        if (commas | self.missing).all():
            raise self._no_number(int((commas & ~self.missing).argmax()))
        if self.kind == "numbers" and self.counts_rows:
            raise self.bad(f"numbers the rows; {self._left_out}, or write numeric = [{self.name!r}] if it says more")
        if self.kind == "texts" and self.differs_everywhere:
            many = len(self.codes()[1])
            raise self.bad(
                f"has {many} different texts in {len(self.missing)} rows, such as {self.codes()[1][0]!r}, so no model learns "
                f"from it; {self._left_out}, or write categorical = [{self.name!r}] if it repeats in other data"
            )

    @cached_property
    def counts_rows(self) -> bool:
        """Whether the values count up in steps of one from row to row, or are different whole numbers of an id by name."""
        values = self.numbers()
        if len(values) < FEW or self.missing.any() or (values != np.trunc(values)).any():
            return False
        plain = "".join(letter for letter in self.name.casefold() if letter.isalnum())
        is_named_so = plain in ID_NAMES or self.name.casefold().endswith(("_id", " id")) or self.name.endswith("Id")
        return bool((np.diff(values) == 1).all()) or (is_named_so and len(np.unique(values)) == len(values))

    @cached_property
    def differs_everywhere(self) -> bool:
        """Whether more than half of the values are different from all values before them, and there are more than a few."""
        codes, names = self.codes()
        return len(names) > FEW and 2 * len(names) > int((codes >= 0).sum())

    @property
    def _left_out(self) -> str:
        return MENDS[self.use][0].format(name=self.name)
