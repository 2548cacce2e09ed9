"""The ground floor: a database and an object store. It knows nothing of models, adapters or HTTP.

Engine workers need only `storage.errors`; so SQLAlchemy and fsspec are imported with the name that needs them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .database import Database
    from .objects import ObjectStore

__all__ = ["Database", "ObjectStore"]


def __getattr__(name: str) -> Any:
    if name == "Database":
        from .database import Database

        return Database
    if name == "ObjectStore":
        from .objects import ObjectStore

        return ObjectStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
