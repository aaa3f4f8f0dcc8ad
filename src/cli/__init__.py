"""Config from yaml layers and key=value settings, components from its nodes, and what every verb does first."""
