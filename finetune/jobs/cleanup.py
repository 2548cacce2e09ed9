"""What of a run's folder goes when its job has ended: what nobody will read again."""

import shutil

from ..run_folder import RunFolder


def tidy(run: RunFolder, *, succeeded: bool) -> None:
    """Tokenised data and copies of files go; spec, log, events, checkpoints and result stay.

    A job that succeeded resumes no more, so its states go as well; one that failed or was cancelled may be resumed.
    """
    if not succeeded:
        return
    for folder in (run.data, run.path / "files", run.path / "trainer"):
        shutil.rmtree(folder, ignore_errors=True)
    for step in run.steps():
        shutil.rmtree(run.checkpoint(step) / "state", ignore_errors=True)
