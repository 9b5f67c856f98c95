"""Drop-in acceleration of models that other code defines."""

from .accelerate import accelerate, restore
from .report import AccelerationReport, acceleration_report

__all__ = ["AccelerationReport", "accelerate", "acceleration_report", "restore"]
