"""Changes to models that exist already."""
