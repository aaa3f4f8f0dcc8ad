"""Other people's data: annotation files to entries, image files to small RGB images, both to photos."""
