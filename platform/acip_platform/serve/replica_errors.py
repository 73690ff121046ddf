"""Errors of calls to other deployments, as errors for clients."""

import contextlib
import logging
from collections.abc import Iterator

from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError

from acip_platform.serve.coordinator import LOST
from acip_platform.serve.http.errors import RequestError

log = logging.getLogger("ray.serve")


@contextlib.contextmanager
def converted(deployment: str = "engine") -> Iterator[None]:
    """Convert errors of Ray Serve to RequestErrors, whose responses state when to try again."""
    try:
        yield
    except BackPressureError as error:
        raise queue_full() from error
    except LOST as error:
        message = f"the {deployment} stopped and is being replaced; try again in a moment."
        raise RequestError(message, code=f"{deployment}_restarting", status=503) from error
    except RayTaskError as error:
        log.exception("the %s failed", deployment)
        message = f"the {deployment} failed; the reason is in the server's log."
        raise RequestError(message, code="internal_error", status=500) from error


def queue_full() -> RequestError:
    return RequestError("the server is busy and its queue is full; try again in a moment.", code="queue_full", status=429)
