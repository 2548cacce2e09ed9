"""Models as clients see them: base models and adapters in one list. It knows no HTTP."""

from collections.abc import Callable

from ...adapters.base import Adapter, AdapterVersion
from ...adapters.refs import parse_ref
from ...adapters.store import AdapterStore
from ...engines.catalog import CatalogEntry, ModelCatalog
from ...engines.registry import ModelRegistry, ModelStatus
from ...storage.errors import Conflict, InvalidInput, NotFound
from .protocol import ModelCard, ModelStatusCard


class ModelService:
    """Lists, loads, unloads and deletes models by the name that clients use."""

    def __init__(self, *, catalog: ModelCatalog, registry: ModelRegistry, adapters: AdapterStore) -> None:
        self._catalog = catalog
        self._registry = registry
        self._adapters = adapters

    def cards(self, may_use: Callable[[str], bool]) -> list[ModelCard]:
        """Base models first, then adapters, of those that the caller may use."""
        statuses = {status.name: status for status in self._registry.statuses()}
        bases = [_base_card(entry, statuses.get(entry.name)) for entry in self._catalog.list()]
        adapters = [_adapter_card(adapter, statuses.get(adapter.base)) for adapter in self._adapters.list()]
        return [card for card in (*bases, *adapters) if may_use(card.id)]

    def card(self, ref: str) -> ModelCard:
        """One model: a base model's name, an adapter's, or `name@version` or `name@alias`. Raises NotFound."""
        statuses = {status.name: status for status in self._registry.statuses()}
        if self._catalog.known(ref):
            return _base_card(self._catalog.get(ref), statuses.get(ref))
        parsed = parse_ref(ref)
        if not self._adapters.known(parsed.name):
            raise _unknown(ref)
        adapter = self._adapters.get(parsed.name)
        status = statuses.get(adapter.base)
        if parsed.selector is None:
            return _adapter_card(adapter, status)
        return _version_card(ref, self._adapters.resolve(ref), status)

    def is_base(self, name: str) -> bool:
        return self._catalog.known(name)

    async def load(self, name: str, *, source: str | None, pinned: bool | None) -> ModelCard:
        """Load a base model and wait for it. Raises Conflict if an adapter has the name."""
        if self._adapters.known(name):
            raise Conflict(f"'{name}' is an adapter. Load the base model '{self._adapters.get(name).base}' instead.")
        await self._registry.load(name, source=source, pinned=pinned)
        return self.card(name)

    async def unload(self, name: str) -> ModelCard:
        """End a base model's worker; the model stays known. Raises Conflict while requests use it."""
        await self._registry.unload(name)
        return self.card(name)

    async def pin(self, name: str, pinned: bool) -> ModelCard:
        """A pinned model is never unloaded to make room or for being idle."""
        await self._registry.pin(name, pinned)
        return self.card(name)

    async def delete(self, ref: str) -> None:
        """Delete an adapter, one version of it (`name@3`), or forget a base model.

        Raises Conflict while a base model has adapters or requests, or an alias points to the version.
        """
        if self.is_base(ref):
            await self._delete_base(ref)
            return
        parsed = parse_ref(ref)
        if not self._adapters.known(parsed.name):
            raise _unknown(ref)
        if parsed.selector is None:
            await self._adapters.delete(parsed.name)
            return
        version = self._adapters.resolve(ref)
        if str(version.version) != str(parsed.selector):
            raise InvalidInput(
                f"'{ref}' is an alias. DELETE /v1/adapters/{parsed.name}/aliases/{parsed.selector} removes it.",
                param="model",
            )
        await self._adapters.delete_version(parsed.name, version.version)

    async def _delete_base(self, name: str) -> None:
        adapters = self._adapters.list(base=name)
        if adapters:
            raise Conflict(
                f"The base model '{name}' has {len(adapters)} adapters, '{adapters[0].name}' among them. "
                "Delete them first."
            )
        await self._registry.unload(name)
        await self._catalog.remove(name)


def _base_card(entry: CatalogEntry, status: ModelStatus | None) -> ModelCard:
    return ModelCard(
        id=entry.name,
        created=int(entry.created_at.timestamp()),
        root=str(entry.path or entry.source),
        max_model_len=_length(status),
        status=_status_card(status) if status is not None else None,
    )


def _adapter_card(adapter: Adapter, status: ModelStatus | None) -> ModelCard:
    """The adapter as its default alias has it; of a weighted split the version with the largest share."""
    weights = adapter.default_weights
    most = max(weights, key=lambda number: (weights[number], number))
    version = next(version for version in adapter.versions if version.version == most)
    return _version_card(adapter.name, version, status)


def _version_card(ref: str, version: AdapterVersion, status: ModelStatus | None) -> ModelCard:
    return ModelCard(
        id=ref,
        created=int(version.created_at.timestamp()),
        root=version.source or str(version.path),
        parent=version.base,
        max_model_len=_length(status),
    )


def _length(status: ModelStatus | None) -> int | None:
    return status.info.max_model_len if status is not None and status.info is not None else None


def _status_card(status: ModelStatus) -> ModelStatusCard:
    card = ModelStatusCard(
        state=status.state,
        reason=status.reason,
        pinned=status.pinned,
        in_flight=status.in_flight,
        last_used=status.last_used,
    )
    if status.stats is not None:
        card.running, card.waiting = status.stats.running, status.stats.waiting
        card.resident_memory_bytes = status.stats.rss_bytes
    if status.info is not None:
        card.device, card.dtype, card.kernel = status.info.device, status.info.dtype, status.info.kernel
        card.load_seconds, card.pid = status.info.load_seconds, status.info.pid
    return card


def _unknown(ref: str) -> NotFound:
    return NotFound(
        f"There is no model '{ref}'. GET /v1/models lists the known ones.", param="model", code="model_not_found"
    )
