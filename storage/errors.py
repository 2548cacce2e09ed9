"""The one exception tree of Tuneloop. It knows nothing of HTTP: `server/errors.py` alone maps it to status codes.

    TuneloopError
    ├── InvalidInput         the caller sent something wrong; `param` names the field         (400)
    │   ├── TooLarge         a body, file, archive or rank over its limit                     (413)
    │   └── ContextTooLong   prompt plus output does not fit the model's context              (400)
    ├── AuthenticationFailed no key, or one that is unknown, expired or revoked               (401)
    ├── PermissionDenied     the key lacks the scope, or the path is outside the allowed roots (403)
    ├── NotFound             no such model, adapter, version, alias, file ...                 (404)
    ├── Conflict             it exists already, or its state forbids the call                 (409)
    ├── Overloaded           queue or quota full; `retry_after` says how many seconds         (429)
    ├── DeadlineExceeded     the request's time was up before it could finish                 (504)
    └── Unavailable          a worker died, is loading, or the server drains; try again       (503)
        └── StorageFull      the disk or its quota is full                                    (507)

Every message is a whole sentence for the person who reads it: what is wrong, where, and what to do instead.
"""


class TuneloopError(Exception):
    """Base of all errors that are somebody's to read; `code` is a stable snake_case word for programs."""

    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidInput(TuneloopError):
    code = "invalid_value"


class TooLarge(InvalidInput):
    code = "too_large"


class ContextTooLong(InvalidInput):
    code = "context_length_exceeded"


class AuthenticationFailed(TuneloopError):
    code = "invalid_api_key"


class PermissionDenied(TuneloopError):
    code = "permission_denied"


class NotFound(TuneloopError):
    code = "not_found"


class Conflict(TuneloopError):
    code = "conflict"


class Overloaded(TuneloopError):
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after = retry_after


class DeadlineExceeded(TuneloopError):
    code = "deadline_exceeded"


class Unavailable(TuneloopError):
    code = "unavailable"


class StorageFull(Unavailable):
    code = "storage_full"
