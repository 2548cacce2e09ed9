"""Adapters over HTTP: upload, replace, versions, aliases, rollback, download."""
