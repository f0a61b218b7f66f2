"""Updates whose rank changes while training."""
