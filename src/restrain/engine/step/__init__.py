"""What happens around an optimizer's step."""

from restrain.engine.step.climbing import ascend
from restrain.engine.step.clock import Clock
from restrain.engine.step.intersections import nearest
from restrain.engine.step.projection import hold_from_now, in_metric, in_tangent
from restrain.engine.step.replayed import Replayed, can_be_replayed
from restrain.engine.step.stepper import Stepper
from restrain.engine.step.together import check_alone, project_from_now
from restrain.engine.step.updates import has_direction
from restrain.engine.step.worklist import ParameterRules, total

__all__ = [
    "Clock",
    "ParameterRules",
    "Replayed",
    "Stepper",
    "check_alone",
    "ascend",
    "can_be_replayed",
    "has_direction",
    "hold_from_now",
    "in_metric",
    "in_tangent",
    "nearest",
    "project_from_now",
    "total",
]
