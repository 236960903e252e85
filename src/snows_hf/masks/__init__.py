"""Which weights stay: criteria, what they may look at, and how a pattern is shared out among the layers."""
