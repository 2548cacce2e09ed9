"""Routes of /v1/fine_tuning/jobs: OpenAI's calls, and the live stream, curves and log of a job."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import PlainTextResponse, Response

from ..auth import Principal, require
from ..services import Services, get_services
from ..sse import sse_response
from .cards import (
    CheckpointCard,
    EventCard,
    JobCard,
    MetricsCard,
    Page,
    checkpoint_card,
    event_card,
    job_card,
    page,
)
from .events_stream import event_stream
from .intake import JobIntake
from .protocol import CreateJobRequest
from .queries import metadata_filter, resume_point
from .service import FineTuningService

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
WithServices = Annotated[Services, Depends(get_services)]
Tuner = Annotated[Principal, Depends(require("tune"))]
Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str | None, Query()]
AfterSeq = Annotated[int | None, Query(ge=0)]
ONE = "/{fine_tuning_job_id}"


def visible_jobs(services: WithServices, caller: Tuner) -> FineTuningService:
    """The jobs that the caller may see."""
    return FineTuningService(services.jobs, services.settings.home, caller.may_use)


Jobs = Annotated[FineTuningService, Depends(visible_jobs)]


@router.post("")
async def create_job(body: CreateJobRequest, services: WithServices, caller: Tuner) -> JobCard:
    """Train a base model, or go on from an adapter. What could not be trained is refused before the job exists."""
    caller.check_model(body.model)
    intake = JobIntake(catalog=services.catalog, adapters=services.adapters, files=services.files)
    return job_card(await services.jobs.create(await intake.new_job(body)))


@router.get("")
async def list_jobs(request: Request, jobs: Jobs, after: After = None, limit: Limit = 20) -> Page[JobCard]:
    """Jobs, newest first; `metadata[key]=value` keeps those that have it, `metadata=null` those without any."""
    metadata, without = metadata_filter(request)
    found, more = await jobs.list(after=after, limit=limit, metadata=metadata, without_metadata=without)
    return page([job_card(job) for job in found], more)


@router.get(ONE)
async def retrieve_job(fine_tuning_job_id: str, jobs: Jobs) -> JobCard:
    """One job."""
    return job_card(await jobs.get(fine_tuning_job_id))


@router.post(ONE + "/cancel")
async def cancel_job(fine_tuning_job_id: str, services: WithServices, jobs: Jobs) -> JobCard:
    """End a job for good; its checkpoints stay. 409 if it has ended."""
    await jobs.get(fine_tuning_job_id)
    return job_card(await services.jobs.cancel(fine_tuning_job_id))


@router.post(ONE + "/pause")
async def pause_job(fine_tuning_job_id: str, services: WithServices, jobs: Jobs) -> JobCard:
    """Save a checkpoint and let go of the device, until it is resumed. 409 if it has ended or is paused."""
    await jobs.get(fine_tuning_job_id)
    return job_card(await services.jobs.pause(fine_tuning_job_id))


@router.post(ONE + "/resume")
async def resume_job(fine_tuning_job_id: str, services: WithServices, jobs: Jobs) -> JobCard:
    """Queue a paused job again; it goes on from its last checkpoint. 409 if it is not paused."""
    await jobs.get(fine_tuning_job_id)
    return job_card(await services.jobs.resume(fine_tuning_job_id))


@router.get(ONE + "/events", response_model=Page[EventCard])
async def list_events(
    fine_tuning_job_id: str,
    request: Request,
    services: WithServices,
    jobs: Jobs,
    after: After = None,
    limit: Limit = 20,
    stream: bool = False,
) -> Page[EventCard] | Response:
    """A job's events, newest first. `stream=true` is the same as `/events/stream`."""
    await jobs.get(fine_tuning_job_id)
    if stream:
        return await _stream(fine_tuning_job_id, request, services, None)
    found, more = await services.jobs.events(fine_tuning_job_id, after=after, limit=limit)
    return page([event_card(event) for event in found], more)


@router.get(ONE + "/events/stream", response_model=None)
async def stream_events(
    fine_tuning_job_id: str, request: Request, services: WithServices, jobs: Jobs, after_seq: AfterSeq = None
) -> Response:
    """A job's events as server-sent events, oldest first, until it ends: then `[DONE]`.

    `Last-Event-ID` or `after_seq` goes on behind that event.
    """
    await jobs.get(fine_tuning_job_id)
    return await _stream(fine_tuning_job_id, request, services, after_seq)


@router.get(ONE + "/checkpoints")
async def list_checkpoints(
    fine_tuning_job_id: str, services: WithServices, jobs: Jobs, after: After = None, limit: Limit = 10
) -> Page[CheckpointCard]:
    """A job's checkpoints, newest first; each can be used as a model at once."""
    await jobs.get(fine_tuning_job_id)
    found, more = await services.jobs.checkpoints(fine_tuning_job_id, after=after, limit=limit)
    return page([checkpoint_card(checkpoint) for checkpoint in found], more)


@router.get(ONE + "/metrics")
async def job_metrics(fine_tuning_job_id: str, jobs: Jobs) -> MetricsCard:
    """All points of a job's curves, of a running one as far as it is."""
    await jobs.get(fine_tuning_job_id)
    return await jobs.metrics(fine_tuning_job_id)


@router.get(ONE + "/log", response_class=PlainTextResponse)
async def job_log(
    fine_tuning_job_id: str, jobs: Jobs, tail: Annotated[int, Query(ge=1, le=10_000)] = 200
) -> PlainTextResponse:
    """The last lines of what the job's processes printed."""
    await jobs.get(fine_tuning_job_id)
    return PlainTextResponse(await jobs.log(fine_tuning_job_id, tail))


async def _stream(job_id: str, request: Request, services: Services, after_seq: int | None) -> Response:
    events = services.jobs.follow(job_id, after_seq=resume_point(request, after_seq))
    return await sse_response(request, event_stream(events, draining=lambda: services.drain.draining))
