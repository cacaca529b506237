"""What the rank instruments take: the settings of `rankwise train` that decide what a training gives."""

from dataclasses import dataclass
from typing import Any

from tyro.conf import Suppress

from rankwise.train.config import TrainConfig
from rankwise.train.trackers import TrackerName


@dataclass(frozen=True, kw_only=True)
class RankConfig(TrainConfig):
    """Settings of an instrument. Those named here are read by `rankwise train` alone: they are no flags of an
    instrument, and are passed over in a run.yaml."""

    eval_answers: Suppress[int] = 0
    metrics: Suppress[bool] = False
    eval_steps: Suppress[int | None] = None
    patience: Suppress[int] = 3
    save_steps: Suppress[int | None] = None
    tracker: Suppress[tuple[TrackerName, ...]] = ()
    explain_engine: Suppress[bool] = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the settings that no instrument reads."""
        return {name: value for name, value in super().as_dict().items() if name not in READ_BY_TRAIN_ALONE}


READ_BY_TRAIN_ALONE = tuple(RankConfig.__annotations__)
