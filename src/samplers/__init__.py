"""Samplers: from masks (or random tokens) to a text, with the policies that revise it on the way."""
