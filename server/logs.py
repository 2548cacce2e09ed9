"""Structured logs of the whole process: JSON lines for machines, coloured ones for people. One request id a request.

Everything goes through the standard library's root logger, so that uvicorn, SQLAlchemy and the rest look the same.
"""

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import Processor

_QUIET = ("uvicorn.access", "httpx", "httpcore", "aiosqlite", "alembic.runtime.migration")


def configure_logs(log_format: Literal["auto", "console", "json"], log_level: str) -> None:
    """Set up logging of this process, on stderr. Safe to repeat; the last call wins."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,  # the request id, bound by the middleware
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    as_console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    ends: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if as_console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ends]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level.upper())
    for name in _QUIET:  # our access log replaces uvicorn's; the others tell a line for every call
        logging.getLogger(name).setLevel(logging.WARNING)
