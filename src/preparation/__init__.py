"""Raw files -> shards: annotations, images and texts of many forms, and the embedded scenes."""
