"""Strengths that change during training: schedules and targets."""

from restrain.engine.strengths.moving import Activity, Moving, Strengths, gradient_share, tensor_of

__all__ = ["Activity", "Moving", "Strengths", "gradient_share", "tensor_of"]
