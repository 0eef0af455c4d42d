"""Strengths that change during training: schedules and targets."""

from restrain.engine.strengths.moving import Activity, Moving, Strengths, tensor_of

__all__ = ["Activity", "Moving", "Strengths", "tensor_of"]
