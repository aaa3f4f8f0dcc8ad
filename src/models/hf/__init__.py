"""Hugging Face model folders, released and our own, in and out."""
