"""Read and write Hugging Face model folders: the released layouts and our own."""
