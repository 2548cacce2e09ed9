"""Data sets, methods, jobs and their launchers, evaluation, export. Sits above `engines`, below `server`."""
