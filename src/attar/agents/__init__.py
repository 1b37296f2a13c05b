"""A model that acts: environments, and the episodes that are played in them."""
