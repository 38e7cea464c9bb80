"""``python -m service replay``: brings to MLflow what processes that are dead left in the spool."""

import logging
from pathlib import Path

from service.config.logging import configure_logging, detach_bridge, drain_lines
from service.config.settings import Settings
from service.recording.delivery import Delivery
from service.recording.mlflow import Tracker, TrackerError
from service.recording.run import Losses
from service.telemetry.providers import SCOPE, Telemetry, build_telemetry

logger = logging.getLogger(__name__)


def replay(settings: Settings) -> int:
    """Replay everything that no living process owns; 0 when MLflow has it all, 1 when something is left."""
    if not settings.mlflow_tracking_uri:
        logger.error("Error: MLFLOW_TRACKING_URI must be set: it says where the records go.")
        return 1
    telemetry = build_telemetry(settings)
    configure_logging(settings.log_level, telemetry.logger_provider)
    try:
        return _replay(settings, telemetry)
    finally:
        detach_bridge()
        telemetry.shutdown(settings.telemetry_flush_timeout_s)
        drain_lines()


def _replay(settings: Settings, telemetry: Telemetry) -> int:
    losses = Losses(telemetry.instruments)
    delivery = Delivery(
        Tracker(settings, telemetry.identity),
        telemetry.instruments,
        telemetry.tracer_provider.get_tracer(SCOPE),
        on_lost=losses.add,
    )
    try:
        replayed = delivery.send_estates(Path(settings.spool_path), settings.spool_max_age_s)
    except TrackerError as error:
        logger.error("Error: MLflow does not take the records: %s", error.reason)  # noqa: TRY400 - no bug
        return 1
    except OSError as error:
        logger.error("Error: the spool cannot be worked on: %s", error.strerror)  # noqa: TRY400 - no bug
        return 1
    finally:
        losses.say()
    if replayed.files_kept:
        logger.error(
            "Error: MLflow refused %d file(s) of records, which stay in the spool", replayed.files_kept
        )
        return 1
    logger.info("Nothing is left to replay", extra={"records": replayed.records})
    return 0
