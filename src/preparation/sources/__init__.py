"""Sources of photographs: one file for each format of annotations, and what finds their images."""
