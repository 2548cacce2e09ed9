"""Which devices are free. It knows names and numbers, not what runs on them."""

from collections.abc import Sequence

from ...storage.errors import InvalidInput


class DevicePool:
    """Devices named by the operator; without names one slot, in which the trainer takes what it finds."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._taken: dict[str, tuple[str, ...]] = {}

    def check(self, count: int) -> None:
        """Raises InvalidInput for a job that could never start."""
        if self._names and count > len(self._names):
            raise InvalidInput(
                f"The job wants {count} processes, one a device, and this server trains on {len(self._names)} "
                f"({', '.join(self._names)}). Set num_processes to at most {len(self._names)}.",
                param="tuning.num_processes",
            )

    def take(self, job_id: str, count: int) -> tuple[str, ...] | None:
        """Devices for a job, or None while too few are free. Without names the tuple is empty."""
        if not self._names:
            if self._taken:
                return None
            self._taken[job_id] = ()
            return ()
        used = {name for names in self._taken.values() for name in names}
        free = [name for name in self._names if name not in used]
        if len(free) < count:
            return None
        self._taken[job_id] = tuple(free[:count])
        return self._taken[job_id]

    def hold(self, job_id: str, names: Sequence[str]) -> None:
        """Count a job that is found running: its devices are taken whatever the settings say now."""
        self._taken[job_id] = tuple(names)

    def give_back(self, job_id: str) -> None:
        """Safe to repeat."""
        self._taken.pop(job_id, None)
