"""A package outside kvlab, with something of every kind that kvlab takes by entry point."""
