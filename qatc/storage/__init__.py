"""What lies on the disk: written completely or not at all, locked, and known by its marks."""
