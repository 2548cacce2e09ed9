"""Query parameters that FastAPI has no form for: a metadata filter, and where a stream of events goes on."""

import re

from starlette.requests import Request

from ...storage.errors import InvalidInput

_METADATA = re.compile(r"metadata\[(.*)\]")


def metadata_filter(request: Request) -> tuple[dict[str, str] | None, bool]:
    """`metadata[key]=value`, as often as wanted; or `metadata=null`, which asks for jobs without any (then True)."""
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        matched = _METADATA.fullmatch(name)
        if matched is None:
            continue
        if wanted.get(matched[1], value) != value:
            raise InvalidInput(
                f"The filter metadata[{matched[1]}] is given twice with different values; no job has both.",
                param="metadata",
            )
        wanted[matched[1]] = value
    literal = request.query_params.get("metadata")
    if literal is None:
        return wanted or None, False
    if literal != "null" or wanted:
        raise InvalidInput(
            "The filter is metadata[key]=value (several are joined by 'and'), or metadata=null alone for jobs "
            "without metadata.",
            param="metadata",
        )
    return None, True


def resume_point(request: Request, after_seq: int | None) -> int:
    """The `seq` behind which a stream goes on: `?after_seq=`, else the header that EventSource clients send."""
    header = request.headers.get("last-event-id", "").strip()
    if after_seq is not None or not header:
        return after_seq or 0
    if not header.isascii() or not header.isdigit():
        raise InvalidInput(
            f"The header Last-Event-ID is {header!r}, and the ids of events are numbers. Leave it out to see all.",
            param="Last-Event-ID",
        )
    return int(header)
