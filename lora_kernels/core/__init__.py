"""What every other module stands on. It imports torch alone."""
