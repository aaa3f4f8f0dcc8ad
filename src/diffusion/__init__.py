"""The maths of masked diffusion with revision: functions and small classes over tensors."""
