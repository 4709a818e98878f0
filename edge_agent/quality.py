"""Whether a release is clearly worse on this device than the one in use. Pure."""

from typing import Annotated

from msgspec import Meta

from edge_agent.jobs import Judged
from shared.config import Section
from shared.messages import RISING, Metric


class Quality(Section, frozen=True):
    """Section [local]: which release is the model in use on this device."""

    refuse: bool = False
    """Judge each release on the local hold-out, when the device is free to, and keep the one before if it is clearly
    worse or cannot be judged. Otherwise every release is in use as soon as it is accepted."""
    drop: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.05
    """What an accuracy may be lower by, as a share of one."""
    ratio: Annotated[float, Meta(ge=1.0, le=1e6)] = 1.25
    """What an error or a loss may be multiplied by."""
    examples: Annotated[int, Meta(ge=1, le=2**31)] = 20
    """In the hold-out, below which it says nothing."""
    public: bool = False
    """Whether every user of this device may read the models; else root and the agent alone."""

    @property
    def asked(self) -> bool:
        """Whether releases are judged."""
        return self.refuse


def refusal(quality: Quality, metric: Metric, judged: Judged) -> str | None:
    """Why the release is clearly worse than the one in use; None if it is not, or nobody can say."""
    now, before = judged.metrics.get(metric), judged.before.get(metric)
    if judged.examples < quality.examples or before is None:
        return None
    if now is None:
        return f"its {metric} on {judged.examples} local examples is no number, that of the one in use {before:.4g}"
    if metric in RISING:
        worse, allowed = before - now > quality.drop, f"local.drop is {quality.drop:g}"
    else:
        worse, allowed = before > 0 and now > quality.ratio * before, f"local.ratio is {quality.ratio:g}"
    told = f"{metric} {now:.4g} on {judged.examples} local examples, {before:.4g} of the one in use; {allowed}"
    return told if worse else None
