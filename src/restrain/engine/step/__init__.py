"""What happens around an optimizer's step."""

from restrain.engine.step.clock import Clock
from restrain.engine.step.intersections import nearest
from restrain.engine.step.projection import hold_from_now, in_metric, in_tangent
from restrain.engine.step.stepper import Stepper
from restrain.engine.step.worklist import ParameterRules, total

__all__ = ["Clock", "ParameterRules", "Stepper", "hold_from_now", "in_metric", "in_tangent", "nearest", "total"]
