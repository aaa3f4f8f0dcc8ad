"""Samplers: from masks (or random tokens) to a response, with the policies that revise it on the way."""
