"""The maths of masked diffusion with revision: corruptions, noise and losses as functions of tensors."""
