"""Grids of models and samplers, their stored results, and tables and plots of them."""
