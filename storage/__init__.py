"""The ground floor: a database and an object store. It knows nothing of models, adapters or HTTP."""

from .database import Database
from .objects import ObjectStore

__all__ = ["Database", "ObjectStore"]
