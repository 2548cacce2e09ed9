"""A run for Weights & Biases: sent where the user has logged in, else written for `wandb sync`.

WANDB_API_KEY (or `wandb login`), WANDB_MODE, WANDB_BASE_URL and W&B's other variables are wandb's own to read.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .base import Status, Tracker

if TYPE_CHECKING:
    import wandb

_CONNECT_SECONDS = 30.0


class WeightsAndBiases(Tracker):
    _run: "wandb.Run"

    def start(self, run_name: str, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to wandb's makers; both are read at the import
        os.environ.setdefault("WANDB_CACHE_DIR", str(self.folder / "cache"))  # its service's logs
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        configured = wandb.setup().settings
        values = {**config, "metadata": dict(metadata)} if metadata else dict(config)
        if configured.mode not in ("online", "run", "shared") or not _logged_in():
            mode = "disabled" if configured.mode == "disabled" else "offline"
            self._run = self._init(run_name, values, mode)
            return
        try:
            self._run = self._init(run_name, values, "online")
        except wandb.errors.Error as error:
            self.warn(
                f"Weights & Biases could not be reached ({error}), so the run is written to {self.folder} instead. "
                f"`wandb sync {self.folder}/wandb/offline-run-*` sends it later."
            )
            wandb.teardown()  # its service holds on to the run's id
            self._run = self._init(run_name, values, "offline")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if metrics:
            self._run.log({**metrics, "trainer/global_step": step}, step=step)

    def finish(self, status: Status) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status == "failed" else 0)

    def _init(self, run_name: str, config: Mapping[str, Any], mode: Any) -> "wandb.Run":
        import wandb

        return wandb.init(
            project=self.options.project or "tuneloop",
            entity=self.options.entity,
            name=run_name,
            tags=self.options.tags or None,
            config=dict(config),
            dir=str(self.folder),
            mode=mode,
            # the same at every attempt, so that a resumed job goes on in one run
            id=hashlib.sha256(str(self.folder.absolute()).encode()).hexdigest()[:16],
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=min(wandb.setup().settings.init_timeout, _CONNECT_SECONDS),
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_save_requirements=False,
                x_disable_meta=True,  # host name, user and command line are nobody's business
            ),
        )


def _logged_in() -> bool:
    """Whether there is a key in the environment, in wandb's settings or in ~/.netrc. Asks nobody."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    known = settings.api_key or settings.identity_token_file or wbauth.read_netrc_auth(host=settings.base_url)
    return known is not None
