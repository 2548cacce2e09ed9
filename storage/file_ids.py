"""Ids of files: `file-` and 24 characters that sort by the moment of creation. It knows no table.

The first ten say the microsecond, so that an id is a place in the list even after its file is gone: a client may
delete files while it pages through them.
"""

import re
import secrets
from datetime import UTC, datetime, timedelta

from .errors import InvalidInput

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_TIME_LENGTH = 10  # microseconds since 1970 fit until 2085
_RANDOM_LENGTH = 14
_ID = re.compile(rf"file-([0-9a-z]{{{_TIME_LENGTH}}})[0-9a-z]{{{_RANDOM_LENGTH}}}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def new_id(created_at: datetime) -> str:
    """An id that nothing has had yet, for a file of that moment."""
    microseconds = (created_at - _EPOCH) // _MICROSECOND
    time = ""
    for _ in range(_TIME_LENGTH):
        microseconds, digit = divmod(microseconds, len(_DIGITS))
        time = _DIGITS[digit] + time
    return f"file-{time}{''.join(secrets.choice(_DIGITS) for _ in range(_RANDOM_LENGTH))}"


def created_at_of(file_id: str) -> datetime:
    """The moment that an id says. Raises InvalidInput (param `after`) if it is none of ours."""
    match = _ID.fullmatch(file_id)
    if match is None:
        raise InvalidInput(
            f"`after` is {file_id!r}, which is no id of a file. Give the last id of the page before.", param="after"
        )
    return _EPOCH + int(match[1], len(_DIGITS)) * _MICROSECOND
