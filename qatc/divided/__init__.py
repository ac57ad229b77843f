"""Models that are divided among processes: none of them ever holds all of one."""
