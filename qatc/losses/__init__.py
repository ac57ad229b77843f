"""What a training lowers: distances between a student and its teacher, and how they are read."""
