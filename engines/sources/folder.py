"""Local folders are served where they are: nothing is copied. It knows no cache."""

from pathlib import Path

from ...storage.errors import NotFound
from .base import FetchContext, ModelSource
from .checkpoint import check_checkpoint


def open_folder(location: str) -> Path:
    """The folder itself, once it is known to be a checkpoint. Raises NotFound or InvalidInput."""
    folder = Path(location)
    if not folder.is_dir():
        raise NotFound(f"The model folder {folder} does not exist or is not a folder.", param="source")
    check_checkpoint(folder)
    return folder


class FolderSource(ModelSource):
    def fetch(self, location: str, context: FetchContext) -> Path:
        return open_folder(location)
